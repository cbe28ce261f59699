"""FSQ and BSQ as functions and in a tokenizer: closed forms, what survives, gradients, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import random_params

from ar_jax.tokenizers import quantize_scalar as scalar
from ar_jax.tokenizers import quantize_spherical as spherical
from ar_jax.tokenizers.fixed_codes import FixedCodes
from ar_jax.tokenizers.quantize_scalar import FSQ
from ar_jax.tokenizers.quantize_spherical import BSQ, SphericalLoss

NET = {"features": 4, "mult": (1, 2), "res_blocks": 0, "latent": 6, "groups": 2}
TOKENIZERS = {
    "fsq": FixedCodes((8, 12), quantiser=FSQ((4, 3, 5)), **NET),
    "fsq_apart": FixedCodes((8, 12), quantiser=FSQ((4, 3, 5), joint=False), **NET),
    "bsq": FixedCodes((8, 12), quantiser=BSQ(5, joint=True), **NET),
    "bsq_apart": FixedCodes((8, 12), quantiser=BSQ(5), **NET),
}


def test_levels_lie_around_zero_and_every_index_has_a_code_of_its_own():
    levels = (8, 5, 2)
    index = np.arange(80, dtype=np.int32)
    digits = scalar.split(index, levels)
    np.testing.assert_array_equal(scalar.joined(digits, levels), index)
    np.testing.assert_array_equal(digits[:9], [*([i, 0, 0] for i in range(8)), [0, 1, 0]])
    codes = np.asarray(scalar.scalar_codes(digits, levels))
    assert len(np.unique(codes, axis=0)) == 80
    np.testing.assert_allclose(np.unique(codes[:, 0]), np.arange(-4, 4) / 4)
    np.testing.assert_allclose(np.unique(codes[:, 1]), np.arange(-2, 3) / 2)
    np.testing.assert_allclose(np.unique(codes[:, 2]), [-1, 0])
    # numbers far out reach the outermost levels
    z = np.array([[-9, -9, -9], [0, 0, 1], [9, 9, 9]], np.float32)
    found, digits = scalar.scalar_quantise(z, levels)
    np.testing.assert_array_equal(digits, [[0, 0, 0], [4, 2, 1], [7, 4, 1]])
    np.testing.assert_allclose(found, scalar.scalar_codes(digits, levels), atol=1e-6)


def test_the_gradient_of_a_level_is_that_of_its_bound():
    z, levels = np.linspace(-2, 2, 12, dtype=np.float32).reshape(4, 3), (8, 5, 4)
    grad = jax.grad(lambda z: scalar.scalar_quantise(z, levels)[0].sum())(z)
    half = np.array([3.5, 2.0, 1.5]) * 1.001
    shift = np.arctanh(np.array([0.5, 0.0, 0.5]) / half)
    np.testing.assert_allclose(grad, half / np.cosh(z + shift) ** 2 / [4, 2, 2], rtol=1e-5)


def test_bits_are_signs_and_the_first_counts_most():
    z = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    z[0, 2] = 0
    code, bits, losses = spherical.spherical_quantise(z)
    np.testing.assert_array_equal(bits, z > 0)
    np.testing.assert_allclose(code, np.where(z > 0, 1, -1) / np.sqrt(5), rtol=1e-6)
    np.testing.assert_array_equal(spherical.index_of(bits), bits @ 2 ** np.arange(5)[::-1])
    index = np.arange(2**12, dtype=np.int32)
    np.testing.assert_array_equal(spherical.index_of(spherical.bits_of(index, 12)), index)
    u = z / np.linalg.norm(z, axis=1, keepdims=True)
    np.testing.assert_allclose(losses["commit"], 0.25 * np.square(u - code).mean(), rtol=1e-5)


def test_entropies_are_those_of_all_codes_together_and_stay_finite_when_compiled():
    """Bits are independent, so the entropy of the whole code is the sum of theirs."""
    u = np.random.default_rng(1).normal(size=(50, 4)).astype(np.float32)
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    corners = np.asarray(spherical.corner(spherical.bits_of(np.arange(16, dtype=np.int32), 4)))
    p = np.asarray(jax.nn.softmax(2 * 3.0 * u @ corners.T))
    entropies = jax.jit(functools.partial(spherical.bit_entropies, sharpness=3.0))
    np.testing.assert_allclose(entropies(u)[0], -(p * np.log(p)).sum(1).mean(), rtol=1e-4)

    def loss(z):
        return spherical.spherical_quantise(z, SphericalLoss())[2]["entropy"]

    found, grad = jax.jit(jax.value_and_grad(loss))(np.eye(4, dtype=np.float32))
    assert np.isfinite(found)
    assert np.isfinite(grad).all()


def test_length_is_lost_and_the_gradient_is_that_of_the_vector_of_length_one():
    z = np.array([[3.0, -4.0]], np.float32)
    readout = np.array([[1.0, 2.0]])
    grad = jax.grad(lambda z: (spherical.spherical_quantise(z)[0] * readout).sum())(z)
    np.testing.assert_allclose(grad, jax.grad(lambda z: (z / jnp.linalg.norm(z) * readout).sum())(z), atol=1e-6)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_survive_and_training_sees_what_decoding_gives(name):
    tokenizer = TOKENIZERS[name]
    image = np.clip(np.random.default_rng(2).normal(size=(2, 8, 12, 3)), -1, 1).astype(np.float32)

    def run(self):
        recon, losses, seen = self.autoencode(image)
        tokens = self.encode(image)
        codes = self.embed(tokens)
        return (
            recon,
            losses,
            seen["tokens"],
            tokens,
            self.decode(tokens),
            self.quantiser(codes)[1],
            codes,
            self.embed(codes),
        )

    out = jax.jit(lambda params: tokenizer.apply({"params": params}, method=run))(random_params(tokenizer, 0.5))
    recon, losses, seen, tokens, decoded, again, codes, same = out
    assert tokens.shape == (2, 24, len(tokenizer.spec.codes))
    assert (tokens.max((0, 1)) < np.array(tokenizer.spec.codes)).all()
    assert len(np.unique(tokens.reshape(48, -1), axis=0)) > 4
    np.testing.assert_array_equal(seen, tokens)
    np.testing.assert_array_equal(same, codes)
    np.testing.assert_allclose(recon, decoded, atol=1e-5)
    if "bsq" in name:
        np.testing.assert_array_equal(again, tokens)
        np.testing.assert_allclose(np.linalg.norm(codes, axis=-1), 1, rtol=1e-5)
        assert losses.keys() == {"commit", "entropy"}


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match=r"levels .* make 4294967296 codes in one, but int32 counts 2147483647"):
        FSQ((16,) * 8)
    assert FSQ((16,) * 8, joint=False).codes == (16,) * 8
    with pytest.raises(ValueError, match=r"quantiser\.levels is \(8, 1\); it must be two or more"):
        FSQ((8, 1))
    with pytest.raises(ValueError, match=r"32 bits are no int32 index, which holds 30; keep the bits apart"):
        BSQ(32, joint=True)
    assert BSQ(32).codes == (2,) * 32
    with pytest.raises(ValueError, match=r"quantiser\.bits is 0"):
        BSQ(0)
    with pytest.raises(ValueError, match=r"tokenizer\.size must be multiples of 2 pixels, got \(8, 13\)"):
        _ = TOKENIZERS["fsq"].clone(size=(8, 13)).spec
