"""FlexTok: ordered codes, any first part of which decodes, by a flow inside the one program of sampling."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import initial_params, never_moved, random_params

from ar_jax.config import TokenizerStage
from ar_jax.convert.sources import param_shapes
from ar_jax.data import Info
from ar_jax.decode.edit import free_slots
from ar_jax.decode.glimpse import glimpse
from ar_jax.decode.sampling import Sampling
from ar_jax.files.models import describe
from ar_jax.generators.causal import Causal
from ar_jax.nets.conditioning import Label
from ar_jax.nets.fixed_norm import FixedNorm
from ar_jax.nets.transformer import Transformer
from ar_jax.orders import raster
from ar_jax.tokenizers.flextok import FlexTok
from ar_jax.tokenizers.kl_vae import KLVAE
from ar_jax.tokenizers.patches import Patches
from ar_jax.tokenizers.quantize_scalar import FSQ
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.train.__main__ import prepare

NET = {"width": 16, "heads": 2, "hidden": 24}
PIXELS = Patches((8, 12), 4)
TINY = FlexTok(
    PIXELS, 6, FixedNorm(1, **NET), FixedNorm(2, kinds=2, **NET), FSQ((3, 4)), steps=3, guidance=2.0, unrounded=0.5
)  # fmt: skip
IMAGES = np.random.default_rng(0).uniform(-1, 1, (4, 8, 12, 3)).astype(np.float32)
CLOSE = {"atol": 2e-5, "rtol": 0}


@functools.cache
def call():
    params = random_params(TINY, 0.3)
    run = lambda *arguments, method, **keywords: TINY.apply({"params": params}, *arguments, method=method, **keywords)  # noqa: E731
    return jax.jit(run, static_argnames="method")


def test_a_prefix_decodes_by_one_program_and_what_lies_behind_it_changes_nothing():
    tokens, keys = call()(IMAGES, method="encode"), jax.random.split(jax.random.key(1), 4)
    counts = np.array([1, 3, 5, 6], np.int32)
    shown = call()(tokens, counts, key=keys, method="prefix")
    other = jnp.where(np.arange(6)[None, :, None] < counts[:, None, None], tokens, (tokens + 1) % 12)
    np.testing.assert_allclose(call()(other, counts, key=keys, method="prefix"), shown, **CLOSE)
    alone = call()(tokens[1:2], np.int32(3), key=keys[1:2], method="prefix")
    np.testing.assert_allclose(alone, shown[1:2], **CLOSE)
    whole = call()(tokens, key=keys, method="decode")
    np.testing.assert_allclose(shown[3], whole[3], **CLOSE)
    assert np.abs(shown - whole)[:3].max((1, 2, 3)).min() > 0.01
    assert TINY.prefixes == (1, 2, 3, 4, 5, 6)
    frozen = lambda *arguments, method, key: call()(*arguments, key=key, method=method)  # noqa: E731
    seen = glimpse(TINY, frozen, tokens, jnp.arange(6) < counts[:, None], keys)
    np.testing.assert_allclose(seen, shown, **CLOSE)


def test_noise_is_the_keys_one_for_all_or_one_for_each():
    tokens, key = jnp.zeros((3, 6, 1), jnp.int32), jax.random.key(3)
    first = call()(tokens, key=key, method="decode")
    assert np.abs(first[0] - first[1]).max() > 0.1
    np.testing.assert_array_equal(call()(tokens, key=key, method="decode"), first)
    each = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(3))
    np.testing.assert_array_equal(call()(tokens, key=each, method="decode"), first)


def test_a_shorter_line_has_the_first_codes_and_decodes_as_their_prefix():
    short, params = TINY.clone(length=2), random_params(TINY, 0.3)
    tokens = call()(IMAGES, method="encode")
    assert (short.spec.n, short.prefixes) == (2, (1, 2))

    @jax.jit
    def run(params):
        found = short.apply({"params": params}, IMAGES, method="encode")
        return found, short.apply({"params": params}, found, method="decode")

    found, shown = run(params)
    np.testing.assert_array_equal(found, tokens[:, :2])
    np.testing.assert_allclose(shown, call()(tokens, np.int32(2), method="prefix"), **CLOSE)


def test_editing_keeps_all_tokens_or_none():
    free = np.zeros((2, 8, 12), bool)
    free[1, 0, 0] = True
    np.testing.assert_array_equal(free_slots(TINY.spec, free), [[False] * 6, [True] * 6])


def test_sampling_with_its_flow_is_one_program_that_never_turns_to_the_host():
    net = Transformer(1, 16, 2, hidden=24, line=True)
    generator = Causal(net, Label(16)).complete(TINY.spec, Info(classes=3))
    params, frozen = random_params(generator, 0.3), random_params(TINY, 0.3)
    batch, keys = {"label": jnp.arange(4) % 3}, jax.random.split(jax.random.key(0), 4)

    def images(sampling, params, frozen, batch, keys):
        drawer, tokenizer, order = sampling.adapted(generator, TINY, raster)
        return sampling.images(drawer, tokenizer, params, frozen, batch, order(drawer.spec), keys=keys)[0]

    run = jax.jit(functools.partial(images, Sampling()))
    arguments = jax.device_put((params, frozen, batch, keys))
    with jax.transfer_guard("disallow"):
        drawn = jax.block_until_ready(run(*arguments))
    text = run.lower(*arguments).compile().as_text()
    assert text.count(" while(") >= 2, "a loop over tokens and one over the flow's steps"
    assert not re.search(r"callback|infeed|outfeed|\b(send|recv)\(", text)
    turned = run(params, frozen, {"label": batch["label"][::-1]}, keys[::-1])
    np.testing.assert_allclose(turned[::-1], drawn, **CLOSE)
    fields = (("tokenizer.length", 2), ("tokenizer.steps", 5), ("tokenizer.guidance", 1.0))
    shorter = functools.partial(images, Sampling(fields=fields))
    assert jax.eval_shape(shorter, *arguments).shape == drawn.shape


def test_loss_falls_and_every_parameter_moves_but_the_places():
    module = TINY.clone(unrounded=0.0, dropped=0.3)
    first = params = initial_params(module)
    tx, image = optax.adam(3e-3), IMAGES

    @jax.jit
    def update(params, state, key):
        def loss(params):
            recon, losses, seen = module.apply({"params": params}, image, key=key, method="autoencode")
            assert (recon, seen["tokens"].shape, seen["latents"].shape) == (None, (4, 6, 1), (4, 6, 2))
            return losses["flow"]

        loss, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for i in range(40):
        params, state, loss = update(params, state, jax.random.key(i % 3))
        losses.append(float(loss))
    still = never_moved(first, params)
    assert still == {"['encoder_positions']", "['decoder_positions']"}
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])


def test_the_tokenizer_below_has_its_own_parameters_and_is_not_trained():
    below = KLVAE((8, 8), features=4, mult=(1, 2), res_blocks=1, latent=2, patch=2, groups=2)
    module = TINY.clone(base=below)
    shapes = param_shapes(module)
    assert shapes["base"] == param_shapes(below)

    def loss(params, image):
        return module.apply({"params": params}, image, method="autoencode")[1]["flow"]

    program = jax.make_jaxpr(jax.grad(loss))(shapes, jnp.zeros((1, 8, 8, 3)))
    forward = jax.make_jaxpr(loss)(shapes, jnp.zeros((1, 8, 8, 3)))
    assert str(program).count("conv_general") == str(forward).count("conv_general"), "no gradient goes through it"


@pytest.mark.parametrize(
    ("rule", "want"),
    [("uniform", [1, 3, 6]), ("powers", [1, 4, 6]), ("rounded", [1, 4, 6])],
)
def test_how_many_codes_training_shows(rule, want):
    uniform = jnp.float32([0.0, 0.4 if rule != "powers" else 0.6, 0.99])
    np.testing.assert_array_equal(TINY.clone(kept=rule)._kept(uniform), want)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 7}, r"tokenizer\.length is 7; it must be one of 1 to 6, or 0 for all"),
        ({"kept": "all"}, r"tokenizer\.kept is 'all'; it must be one of uniform, powers, rounded"),
        ({"base": VQGAN((32, 32))}, r"tokenizer\.base is VQGAN, whose tokens are codes already"),
        ({"decoder": FixedNorm(1, **NET)}, r"tokenizer\.decoder\.kinds 0; they must be 0 and 2"),
        ({"encoder": FixedNorm(1, 18, 3)}, r"quarters of a network's width, but the width is 18"),
    ],
)
def test_what_it_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(TINY.clone(**fields).init_params, jax.random.key(0))


def test_an_autoencoder_below_brings_what_was_measured_of_it(tmp_path):
    """Also from a whole tokenizer that another begins as, and when training goes on without either folder."""
    bare, shift, scale = Patches((8, 12), 4), (0.5,), (2.0,)
    describe(tmp_path / "below", "tokenizer", bare.clone(shift=shift, scale=scale), Info(), {})
    parts = (("base", str(tmp_path / "below")),)

    def base(folder, module=TINY, **stage):
        return prepare(TokenizerStage(module=module, **stage), "tokenizer", tmp_path / folder, Info(), {}).module.base

    assert (base("one", parts=parts).shift, base("one", parts=()).scale) == (shift, scale)
    assert base("two", start=str(tmp_path / "one")).scale == scale
    said = base("three", TINY.clone(base=bare.clone(scale=(3.0,))), parts=parts)
    assert (said.shift, said.scale) == (shift, (3.0,))
    assert base("four") == bare
