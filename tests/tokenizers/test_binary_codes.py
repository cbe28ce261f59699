"""Bits read as sub-codes, and ELM's plans of guidance."""

import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.decode.guidance import PLANS, Rising
from ar_jax.generators.inputs import Joined
from ar_jax.orders import raster
from ar_jax.tokenizers.binary_autoencoder import BinaryAutoencoder, bits_of, codes_of
from ar_jax.tokens import TokenSpec, grid


def test_the_first_bit_is_the_most_significant_and_bits_come_back():
    bits = jnp.asarray(np.random.default_rng(0).integers(2, size=(2, 5, 7)), jnp.int32)
    np.testing.assert_array_equal(codes_of(jnp.array([[1, 0, 0, 0, 1]]), (3, 2)), [[4, 1]])
    for parts in ((7,), (3, 4), (2, 3, 2)):
        codes = codes_of(bits, parts)
        assert codes.max() < 2 ** max(parts)
        np.testing.assert_array_equal(bits_of(codes, parts), bits)


def test_parts_that_do_not_fit_the_bits_are_refused():
    plain = BinaryAutoencoder(size=(32, 32), bits=24)
    assert plain.spec.codes == (2,) * 24
    assert plain.clone(parts=(12, 12)).spec.codes == (4096, 4096)
    with pytest.raises(
        ValueError, match=r"tokenizer\.parts is \(12, 11\); its sum must be tokenizer\.bits, which is 24"
    ):
        _ = plain.clone(parts=(12, 11)).spec
    with pytest.raises(ValueError, match=r"it must be the bits of each sub-code, 1 to 30, so that a code fits int32"):
        _ = plain.clone(bits=32, parts=(32,)).spec


def test_plans_rise_to_the_weight_and_unknown_ones_are_refused():
    spec = TokenSpec(grid(2, 4), codes=(3,))
    for plan in PLANS:
        weight = Rising(3.0, plan)(raster(spec), spec)
        assert ((np.diff(weight) > 0) | ((weight[1:] == 3) & (plan == "half_linear"))).all()
        assert 1 <= weight[0] < 1.8
        end = {"square_root": (7 / 8) ** 0.5, "lagging": 7 / 8}.get(plan, 1)
        np.testing.assert_allclose(weight[-1], 1 + 2 * end, rtol=1e-6)
    with pytest.raises(
        ValueError, match=r"guidance\.plan is 'sqrt'; it must be one of linear, cos, log, square, square_root"
    ):
        Rising(3.0, "sqrt")
    with pytest.raises(ValueError, match="Joined needs tokens of codes"):
        Joined().complete(TokenSpec(grid(2, 4), channels=3))
