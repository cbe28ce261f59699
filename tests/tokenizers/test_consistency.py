"""Layton: codes of a small image, a latent diffusion told them, and its consistency decoder, inside the one program of sampling."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import initial_params, never_moved, random_params

from ar_jax.data import Info
from ar_jax.decode.sampling import Sampling
from ar_jax.generators.causal import Causal
from ar_jax.nets.conditioning import Label
from ar_jax.nets.denoiser import Denoiser
from ar_jax.nets.transformer import Transformer
from ar_jax.orders import raster
from ar_jax.tokenizers.consistency import ConsistencyDecoder, cleaned, kept_table, noised, visited
from ar_jax.tokenizers.patches import Patches
from ar_jax.tokenizers.vqgan import VQGAN

READER = VQGAN((4, 4), features=4, mult=(1, 2), res_blocks=1, latent=4, codes=12, code_features=4, groups=2)
FIRST = ConsistencyDecoder(Patches((8, 12), 4, channels=1), READER, Denoiser(2, 16, 2, hidden=24), steps=3)
SECOND = FIRST.clone(consistent=True, steps=2)
IMAGES = np.repeat(np.random.default_rng(0).uniform(-1, 1, (4, 8, 12, 1)), 3, -1).astype(np.float32)
CLOSE = {"atol": 2e-5, "rtol": 0}


@functools.cache
def params():
    return random_params(SECOND, 0.3)


def test_codes_are_the_readers_and_decode_by_one_step_or_two_with_the_same_parameters():
    keys = jax.random.split(jax.random.key(1), 4)

    @functools.partial(jax.jit, static_argnums=0)
    def run(module, params, keys, image):
        call = functools.partial(module.apply, {"params": params})
        tokens = call(image, method="encode")
        return tokens, call(tokens, key=keys, method="decode")

    one, two = (SECOND.clone(steps=steps) for steps in (1, 2))
    tokens, shown = run(two, params(), keys, IMAGES)
    assert (two.spec.n, two.spec.codes, two.spec.placed, two.codebooks[0].path) == (4, (12,), False, "reader/codebook")
    small = IMAGES.reshape(4, 4, 2, 4, 3, 3).mean((2, 4))
    np.testing.assert_array_equal(tokens, READER.apply({"params": params()["reader"]}, small, method="encode"))
    assert (shown.shape, bool(np.isfinite(shown).all())) == (IMAGES.shape, True)
    assert np.abs(run(one, params(), keys, IMAGES)[1] - shown).max() > 0.01
    np.testing.assert_allclose(run(two, params(), keys[::-1], IMAGES[::-1])[1][::-1], shown, **CLOSE)
    assert np.abs(run(two, params(), keys[::-1], IMAGES)[1] - shown).max() > 0.01


def test_at_time_0_latents_are_told_as_they_are_and_noise_is_taken_away_again():
    random = np.random.default_rng(1)
    x, noise = random.normal(size=(2, 4, 6, 16)).astype(np.float32)
    codes, t = random.normal(size=(4, 4, 4)).astype(np.float32), jnp.array([0, 10, 300, 999])
    run = jax.jit(lambda t: SECOND.apply({"params": params()}, x, t, codes, method="told"))
    np.testing.assert_array_equal(run(jnp.zeros(4, jnp.int32)), x)
    assert np.abs(run(t) - x)[1:].max((1, 2)).min() > 0.01
    np.testing.assert_allclose(cleaned(noised(x, noise, t), noise, t), x, atol=1e-4)
    kept = kept_table()
    np.testing.assert_allclose(kept[[0, 999]], [0.99915, 0.0047], atol=1e-4)
    assert [visited(steps).tolist() for steps in (1, 2, 4)] == [[999], [999, 499], [999, 749, 499, 249]]


def test_a_teacher_that_knows_the_noise_leads_back_along_it():
    """Where denoiser and teacher tell zero noise, a step back only scales latents, and consistency is their distance."""
    zero = jax.tree.map(jnp.zeros_like, params())
    x, t = np.random.default_rng(2).normal(size=(4, 6, 16)).astype(np.float32), jnp.array([5, 20, 21, 600])
    codes = np.zeros((4, 4, 4), np.float32)
    now, loss = jax.jit(lambda p: SECOND.apply({"params": p}, x, t, codes, method="agreement"))(zero)
    kept, early = np.float64(kept_table()), np.maximum(np.array(t) - 20, 0)

    def told(x, t):
        late = 10.0 * np.array(t)[:, None, None]
        return 0.25 / (late**2 + 0.25) * x + late / np.sqrt(late**2 + 0.25) * x / np.sqrt(kept[t])[:, None, None]

    there = x * np.sqrt(kept[early] / kept[np.array(t)])[:, None, None]
    far = np.square(told(x, np.array(t)) - told(there, early))
    np.testing.assert_allclose(now, told(x, np.array(t)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loss, (np.sqrt(far + 1e-6) - 1e-3).mean(), rtol=2e-3)


def test_codes_change_nothing_at_the_start_and_something_later():
    net, random = Denoiser(2, 16, 2, hidden=24), np.random.default_rng(3)
    x, codes = random.normal(size=(1, 6, 16)).astype(np.float32), random.normal(size=(2, 1, 4, 4)).astype(np.float32)
    run = jax.jit(lambda params, codes: net.apply({"params": params}, x, jnp.array([3.0]), codes, (2, 3)))
    trained = params()["denoiser"]
    gates = {**trained, "blocks": {**trained["blocks"], "gate": jnp.zeros((2, 16))}}
    np.testing.assert_array_equal(run(gates, codes[0]), run(gates, codes[1]))
    assert np.abs(run(trained, codes[0]) - run(trained, codes[1])).max() > 1e-3


def test_sampling_with_its_decoder_is_one_program_that_never_turns_to_the_host():
    generator = Causal(Transformer(1, 16, 2, hidden=24), Label(16)).complete(SECOND.spec, Info(classes=3))
    batch, keys = {"label": jnp.arange(4) % 3}, jax.random.split(jax.random.key(0), 4)

    def images(sampling, params, frozen, batch, keys):
        drawer, tokenizer, order = sampling.adapted(generator, SECOND, raster)
        return sampling.images(drawer, tokenizer, params, frozen, batch, order(drawer.spec), keys=keys)[0]

    run = jax.jit(functools.partial(images, Sampling()))
    arguments = jax.device_put((random_params(generator, 0.3), params(), batch, keys))
    with jax.transfer_guard("disallow"):
        drawn = jax.block_until_ready(run(*arguments))
    text = run.lower(*arguments).compile().as_text()
    assert text.count(" while(") >= 2, "a loop over tokens and one over the decoder's steps"
    assert not re.search(r"callback|infeed|outfeed|\b(send|recv)\(", text)
    one = functools.partial(images, Sampling(fields=(("tokenizer.steps", 1),)))
    assert jax.eval_shape(one, *arguments).shape == drawn.shape == IMAGES.shape


@pytest.mark.parametrize("module", [FIRST, SECOND], ids=["noise", "consistency"])
def test_loss_falls_and_every_parameter_of_the_decoder_moves(module):
    first = trained = initial_params(module)
    tx = optax.adam(3e-3)

    @jax.jit
    def update(trained, state, key):
        def loss(trained):
            recon, losses, seen = module.apply({"params": trained}, IMAGES, key=key, method="autoencode")
            assert (recon is None, seen["tokens"].shape) == (not module.consistent, (4, 4, 1))
            pixels = jnp.square(recon - IMAGES).mean() if module.consistent else 0.0
            return losses["consistency" if module.consistent else "noise"] + pixels

        loss, grads = jax.value_and_grad(loss)(trained)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(trained, updates), state, loss

    state, losses = tx.init(trained), []
    for i in range(40):
        trained, state, loss = update(trained, state, jax.random.key(i % 3))
        losses.append(float(loss))
    still = never_moved(first, trained)
    assert all("['reader']" in name or "['teacher']" in name for name in still), still
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])


def test_what_does_not_fit_is_refused():
    for fields, message in (
        ({"base": READER}, r"tokenizer\.base is VQGAN, whose tokens are codes already"),
        ({"reader": Patches((8, 12), 4)}, r"tokenizer\.reader is Patches, whose tokens are continuous"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(FIRST.clone(**fields).bind({}).denoised, np.zeros((1, 4, 4), np.float32))
    with pytest.raises(ValueError, match=r"tokenizer\.steps is 1001; there are 1000 times"):
        visited(1001)
