"""D-AR's tokenizer: groups of codes are steps of a flow, so that any of the first groups decode, inside the one program of sampling."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import initial_params, never_moved, random_params

from ar_jax.data import Info
from ar_jax.decode.guidance import Between
from ar_jax.decode.sampling import Sampling
from ar_jax.generators.causal import Causal
from ar_jax.nets.conditioning import Label
from ar_jax.nets.head_norm import HeadNorm, Painter
from ar_jax.nets.transformer import Transformer
from ar_jax.orders import raster
from ar_jax.tokenizers.dar import SequentialDiffusion
from ar_jax.tokens import TokenSpec, grid

NET = {"width": 16, "heads": 2, "hidden": 24}
TINY = SequentialDiffusion(
    (8, 12), 4, (2, 4), 6, HeadNorm(1, **NET), HeadNorm(1, **NET), Painter(2, **NET), codes=12, code_features=4, steps=3,
    group=2, rank=3, rows=8, aligned=(1, 10, 5), channels=1,
)  # fmt: skip
IMAGES = np.random.default_rng(0).uniform(-1, 1, (3, 8, 12, 1)).astype(np.float32)
CLOSE = {"atol": 5e-5, "rtol": 0}


@functools.cache
def call():
    params = random_params(TINY, 0.3)
    run = lambda *arguments, method, **keywords: TINY.apply({"params": params}, *arguments, method=method, **keywords)  # noqa: E731
    return jax.jit(run, static_argnames="method")


def test_whole_groups_decode_by_one_program_and_what_lies_behind_them_changes_nothing():
    tokens, keys = call()(IMAGES, method="encode"), jax.random.split(jax.random.key(1), 3)
    counts = np.array([1, 3, 6], np.int32)
    shown = call()(tokens, counts, key=keys, method="prefix")
    ends = np.array([0, 2, 6])
    other = jnp.where(np.arange(6)[None, :, None] < ends[:, None, None], tokens, (tokens + 1) % 12)
    np.testing.assert_allclose(call()(other, counts, key=keys, method="prefix"), shown, **CLOSE)
    assert not np.asarray(shown[0]).any()  # less than a group is grey
    whole = call()(tokens, key=keys, method="decode")
    np.testing.assert_allclose(shown[2], whole[2], **CLOSE)
    assert np.abs(shown - whole)[1].max() > 0.01
    assert (TINY.prefixes, TINY.clone(length=4).prefixes) == ((2, 4, 6), (2, 4))
    assert TINY.clone(steps=2).ends == (2, 5, 6)  # steps that do not use every code


def test_sampling_with_its_flow_is_one_program_that_never_turns_to_the_host():
    net = Transformer(1, 16, 2, hidden=24, line=True)
    generator = Causal(net, Label(16)).complete(TINY.spec, Info(classes=3))
    params, frozen = random_params(generator, 0.3), random_params(TINY, 0.3)
    keys = jax.random.split(jax.random.key(0), 3)

    @jax.jit
    def run(params, frozen, batch, keys):
        drawn = Sampling(Between(1.2, 3.0)).images(generator, TINY, params, frozen, batch, raster(TINY.spec), keys=keys)
        return drawn[0]

    arguments = jax.device_put((params, frozen, {"label": jnp.arange(3)}, keys))
    with jax.transfer_guard("disallow"):
        drawn = jax.block_until_ready(run(*arguments))
    text = run.lower(*arguments).compile().as_text()
    assert text.count(" while(") >= 2, "a loop over tokens and one over the flow's steps"
    assert not re.search(r"callback|infeed|outfeed|\b(send|recv)\(", text)
    turned = run(params, frozen, {"label": jnp.arange(3)[::-1]}, keys[::-1])
    np.testing.assert_allclose(turned[::-1], drawn, **CLOSE)


def test_loss_falls_and_every_parameter_moves_but_rows_of_no_use():
    first = params = initial_params(TINY)
    tx = optax.adam(5e-3)

    @jax.jit
    def update(params, state, key):
        def loss(params):
            recon, losses, seen = TINY.apply({"params": params}, IMAGES, key=key, method="autoencode")
            assert (recon.shape, set(losses)) == (IMAGES.shape, {"codebook", "commit", "flow"})
            assert (seen["tokens"].shape, seen["latents"].shape) == ((3, 6, 1), (3, 6, 4))
            assert seen["features"].shape == (3, 2, 3, 5)
            return sum(losses.values()) + jnp.square(seen["features"] - 1).mean(), losses["flow"]

        (_, flow), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, flow

    state, losses = tx.init(params), []
    for i in range(60):
        params, state, loss = update(params, state, jax.random.key(i % 3))
        losses.append(float(loss))
    assert not never_moved(first, params)
    for name in ("queries", "positions"):
        np.testing.assert_array_equal(params[name][6:], first[name][6:])
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])


def test_guidance_rises_evenly_and_is_off_below_one():
    spec = TokenSpec(grid(1, 5), codes=(12,))
    found = [Between(*ends)(raster(spec), spec) for ends in ((1, 3), (0.5, 2.5), (2, 1))]
    want = [[1.001, 1.50075, 2.0005, 2.50025, 3], [1, 1, 1.5, 2, 2.5], [2, 1.75, 1.5, 1.25, 1]]
    np.testing.assert_allclose(found, want, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 3}, r"tokenizer\.length is 3; it must be one of 2, 4, 6, or 0 for all"),
        ({"group": 7}, r"tokenizer\.group is 7 and tokenizer\.steps 3; neither may be above the 6 registers"),
        ({"rows": 5}, r"tokenizer\.rows is 5; it must be at least the 6 registers, or 0"),
        ({"aligned": (2, 8, 8)}, r"tokenizer\.aligned is \(2, 8, 8\); it must be a layer of the painter's 2"),
        ({"spread": 0.0}, r"tokenizer\.spread is 0\.0; it must be a finite number of 1e-06 or more"),
        ({"brush": 5}, r"tokenizer\.size must be multiples of 5 pixels, got \(8, 12\)"),
        ({"encoder": HeadNorm(1, 12, 2)}, r"HeadNorm: width / heads is 12 / 2; it must be a multiple of 4"),
    ],
)
def test_what_it_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(TINY.clone(**fields).init_params, jax.random.key(0))
