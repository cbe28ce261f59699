"""Instella-T2I's tokenizer: bits on a line, of images of any size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import initial_params, never_moved, random_params

from ar_jax.nets.head_rms import Doubling, Halving, axes_of, places
from ar_jax.nets.positions import rotary_axes, rotate
from ar_jax.tokenizers.binary_line import BinaryLine

NET = {"width": 16, "heads": 2, "hidden": 24, "halves": False}
LINE = BinaryLine(
    (8, 16), cell=2, slots=3, bits=5, encoder=Halving(2, before=1, **NET), decoder=Doubling(3, before=2, **NET), scale=16,
)  # fmt: skip
IMAGES = np.random.default_rng(0).uniform(-1, 1, (4, 8, 16, 3)).astype(np.float32)


def test_loss_falls_and_every_parameter_moves_with_bits_that_are_drawn():
    first = params = initial_params(LINE)
    tx = optax.adam(1e-2)

    @jax.jit
    def update(params, state, key):
        def loss_fn(params):
            recon, losses, seen = LINE.apply({"params": params}, IMAGES, key=key, method="autoencode")
            return jnp.square(recon - IMAGES).mean() + sum(losses.values()), seen["tokens"]

        (loss, tokens), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, loss, tokens

    state, losses = tx.init(params), []
    for i in range(25):
        params, state, loss, tokens = update(params, state, jax.random.key(i))
        losses.append(float(loss))
        if i == 0:
            drawn = tokens
    assert not never_moved(first, params)
    assert losses[-1] < 0.9 * losses[0]
    assert (drawn != jax.jit(functools.partial(LINE.apply, method="encode"))({"params": first}, IMAGES)).any()


@pytest.mark.parametrize("scale", [0, 16])
def test_tokens_decode_as_in_training_and_to_images_of_another_size(scale):
    line, params = LINE.clone(scale=scale), random_params(LINE, 0.3)

    @jax.jit
    def run(params):
        def run(self):
            tokens = self.encode(IMAGES)
            return tokens, self.decode(tokens), self.latents(IMAGES), self.autoencode(IMAGES)

        large = line.clone(size=(16, 12))
        out = line.apply({"params": params}, method=run)
        return *out, large.apply({"params": params}, out[0], method="decode")

    tokens, decoded, z, (recon, losses, seen), large = run(params)
    assert (tokens.shape, line.spec.codes, line.spec.placed) == ((4, 3, 5), (2,) * 5, False)
    np.testing.assert_array_equal(tokens, z > 0)
    np.testing.assert_array_equal(tokens, seen["tokens"])
    np.testing.assert_allclose(decoded, recon, atol=1e-4)
    p = 1 / (1 + np.exp(-np.float64(z)))
    np.testing.assert_allclose(losses["code"], 0.1 * (p * (1 - p)).mean(), rtol=1e-5)
    assert (large.shape, len(np.unique(tokens.reshape(4, -1), axis=0))) == ((4, 16, 12, 3), 4)


def test_maps_are_halved_to_means_and_doubled_to_copies_beside_what_convolutions_say():
    x = np.random.default_rng(1).normal(size=(1, 4, 6, 16)).astype(np.float32)
    half, twice = (jax.jit(lambda params, x, net=net: net.apply({"params": jax.tree.map(jnp.zeros_like, params)}, x, method="resized"))(
        random_params(LINE, 0.3)[side], x
    ) for side, net in (("encoder", LINE.encoder), ("decoder", LINE.decoder)))  # fmt: skip
    np.testing.assert_allclose(half, x.reshape(1, 2, 2, 3, 2, 16).mean((2, 4)), atol=1e-6)
    np.testing.assert_array_equal(twice, np.repeat(np.repeat(x, 2, 1), 2, 2))


def test_places_are_stretched_and_neighbours_turn_by_differences():
    assert [axes_of(features) for features in (64, 8, 16)] == [(8, 28, 28), (2, 4, 2), (2, 8, 6)]
    found = places(2, 3, 2, span=9)
    assert found.tolist() == [
        [0, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, 8], [0, 4, 0], [0, 4, 8], [0, 8, 0], [0, 8, 8]
    ]  # fmt: skip
    assert places(0, 1, 3).tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2]]
    q, k = np.random.default_rng(2).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

    def product(a, b):
        x, y = (rotate(v, rotary_axes(np.array([place]), (2, 4, 2))) for v, place in ((q, a), (k, b)))
        return float((x * y).sum())

    np.testing.assert_allclose(product((1, 5, 2), (3, 1, 7)), product((11, 8, 0), (13, 4, 5)), rtol=1e-4)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"tokenizer\.size must be multiples of 4 pixels, got \(8, 10\)"):
        _ = LINE.clone(size=(8, 10)).spec
    for fields, message in (
        ({"before": 2}, r"Halving: before is 2, but there are 2 layers"),
        ({"axes": (2, 3, 3)}, r"Halving: axes is \(2, 3, 3\); it must be three even numbers with the sum width / heads = 8"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(LINE.clone(encoder=LINE.encoder.clone(**fields)).init_params, jax.random.key(0))
