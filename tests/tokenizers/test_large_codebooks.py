"""Quantisers that hold no [pixels, codes] array, against the formulas with one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ar_jax.tokenizers import quantize_blocks as blocks
from ar_jax.tokenizers.quantize import VectorLoss, residual_quantise, vector_quantise
from ar_jax.tokenizers.quantize_index import IndexLoss, index_quantise
from ar_jax.tokenizers.quantize_lookup_free import SignLoss, sign_entropies, sign_quantise, signs_of, tokens_of


def drawn(*shape, seed=0, scale=1.0):
    return scale * jax.random.normal(jax.random.key(seed), shape)


def entropies(logits):
    """Of a dense soft assignment [n v]: mean, and of the mean."""
    p = jax.nn.softmax(logits)
    average = p.mean(0)
    return -(p * jax.nn.log_softmax(logits)).sum(-1).mean(), -(average * jnp.log(average + 1e-5)).sum()


Z, BOOK = drawn(2, 3, 4, 5), drawn(23, 5, seed=1)


@pytest.mark.parametrize("limit", [1, 24 * 5, 24 * 8])
def test_nearest_codes_by_blocks_are_those_of_one_array_and_the_first_of_equals(limit):
    """Blocks of 1, 5 and 8 of 23 codes, the last one not full, with gradients and entropy."""
    book = BOOK.at[jnp.array([20, 9])].set(BOOK[3])  # the same code three times, in several blocks
    z = Z.at[0].set(BOOK[3])

    def loss(z, book, limit):
        codes, index, losses = vector_quantise(z, book, VectorLoss(entropy=0.3, temperature=0.7), limit)
        return (codes * drawn(*z.shape, seed=2)).sum() + sum(losses.values()), index

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    (value, index), grads = run(z, book, limit)
    (want, nearest), want_grads = run(z, book, blocks.BLOCK)
    np.testing.assert_array_equal(index, nearest)
    assert (np.asarray(index[0]) == 3).all()
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for got, wanted in zip(grads, want_grads):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("limit", [24 * 5, blocks.BLOCK])
def test_index_back_propagation_is_that_of_a_dense_one_hot(limit):
    def dense(z, book):
        logits = z @ book.T
        p, hard = jax.nn.softmax(logits), jax.nn.one_hot(logits.argmax(-1), len(book))
        quantised = (hard - lax.stop_gradient(p) + p) @ book
        code, stop = hard @ book, lax.stop_gradient
        sample, batch = entropies(logits.reshape(-1, len(book)) / 0.3)
        return quantised, {
            "index": jnp.square(quantised - z).mean(),
            "commit": jnp.square(stop(code) - z).mean(),
            "codebook": 0.25 * jnp.square(code - stop(z)).mean(),
            "entropy": 0.05 * (sample - batch),
        }

    def ours(z, book):
        quantised, _, losses = index_quantise(z, book, IndexLoss(temperature=0.3), limit)
        return quantised, losses

    def objective(quantise):
        def run(z, book):
            quantised, losses = quantise(z, book)
            return (quantised * drawn(*z.shape, seed=2)).sum() + 7 * sum(losses.values()), losses

        return jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))

    # large products: exponentials of codes that are none must not spoil the gradients
    with jax.default_matmul_precision("highest"):
        (value, losses), grads = objective(ours)(-9 * jnp.abs(Z), 9 * jnp.abs(BOOK))
        (want, want_losses), want_grads = objective(dense)(-9 * jnp.abs(Z), 9 * jnp.abs(BOOK))
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for name in want_losses:
        np.testing.assert_allclose(losses[name], want_losses[name], rtol=1e-4, atol=1e-6)
    for got, wanted in zip(grads, want_grads):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-3)


def test_entropies_by_bits_and_halves_are_those_of_the_full_table():
    z = drawn(3, 7, 5, scale=0.003)
    codes = signs_of(jnp.arange(32)[:, None], (5,))

    def dense(z):
        sample, batch = entropies(2 * z.reshape(-1, 5) @ codes.T / 0.01)
        return sample - 2 * batch, (sample, batch)

    def ours(z):
        sample, batch = sign_entropies(z, 0.01)
        return sample - 2 * batch, (sample, batch)

    with jax.default_matmul_precision("highest"):
        (_, want), want_grad = jax.jit(jax.value_and_grad(dense, has_aux=True))(z)
        (_, got), grad = jax.jit(jax.value_and_grad(ours, has_aux=True))(z)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(grad, want_grad, rtol=1e-3, atol=1e-4)
    groups = sum(sign_entropies(part, 0.01)[1] for part in (z[..., :2], z[..., 2:4], z[..., 4:]))
    np.testing.assert_allclose(sign_entropies(z, 0.01, group=2)[1], groups, rtol=1e-6)
    assert groups > got[1], "an upper bound of the joint entropy"


def test_signs_and_tokens_are_each_other_with_the_first_channel_least():
    every = jnp.arange(2**18)[:, None]
    np.testing.assert_array_equal(tokens_of(signs_of(every, (18,)), (18,)), every)
    np.testing.assert_array_equal(signs_of(jnp.array([[1]]), (3,)), [[1, -1, -1]])
    both = tokens_of(signs_of(every, (18,)), (6, 12))
    np.testing.assert_array_equal(both[:, 0] + 64 * both[:, 1], every[:, 0])
    codes, tokens, losses = sign_quantise(jnp.array([[0.0, 0.5, -2.0]]), (1, 2), SignLoss(entropy=0, commit=1.0))
    np.testing.assert_array_equal(codes, [[-1, 1, -1]])
    np.testing.assert_array_equal(tokens, [[0, 1]])
    np.testing.assert_allclose(losses["commit"], (1 + 0.25 + 1) / 3)


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ((31,), r"bits is \(31,\); it must be the bits of each sub-code, 1 to 30, so that a code fits int32"),
        ((), r"bits is \(\)"),
        ((2, 2), r"bits \(2, 2\) are 4 channels, but the latents have 3"),
    ],
)
def test_bits_that_are_no_code_are_refused(bits, message):
    with pytest.raises(ValueError, match=message):
        tokens_of(jnp.zeros((1, 3)), bits)


QUANTISERS = {
    "vq": lambda z, book: vector_quantise(z, book, VectorLoss(entropy=0.1)),
    "ibq": index_quantise,
    "residual": lambda z, book: residual_quantise(
        z[None], book, ((8, 8), (16, 32)), lambda i, x: x if i else jnp.zeros((1, 16, 32, 8)), VectorLoss(entropy=0.1)
    ),
    "lfq": lambda z, book: sign_quantise(jnp.concatenate([z, z, z[..., :2]], -1), (18,)),
}


@pytest.mark.parametrize("name", QUANTISERS)
def test_2_18_codes_need_no_array_of_pixels_and_codes_in_training(name):
    """One would be 512 MiB for 512 pixels; the compiled update is asked, of a codebook whose gradient takes 8 MiB."""

    def loss(z, book):
        quantised, *_, losses = QUANTISERS[name](z, book)
        return quantised.sum() + sum(losses.values())

    z, book = jax.ShapeDtypeStruct((16, 32, 8), jnp.float32), jax.ShapeDtypeStruct((2**18, 8), jnp.float32)
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(z, book).compile()
    held = compiled.memory_analysis().temp_size_in_bytes
    assert held < (32 if name == "lfq" else 256) * 2**20
