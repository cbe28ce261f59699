"""Codes are drawn by their probabilities, also where these are small: Gumbel noise of 32 bits ends too early for that."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cut_gumbel import cut

from ar_jax.heads.categorical import draw, gumbel

RARE = ((1e-5, 2**11), (1e-6, 2**14))  # probability of an entry, how many there are
DRAWS = 1000


def test_rare_codes_are_drawn_as_often_as_they_should():
    """Many entries of each kind, so that a thousand draws meet some."""
    p = np.concatenate([np.full(count, p) for p, count in RARE])
    logits = jnp.asarray(np.log(np.append(p, 1 - p.sum())), jnp.float32)[None, None]

    @jax.jit
    def drawn(keys):
        return jax.lax.map(lambda key: draw(logits, key[None, None], jnp.ones(()))[0, 0], keys)

    ends = np.cumsum([count for _, count in RARE])
    kind = np.searchsorted(ends, np.asarray(drawn(jax.random.split(jax.random.key(0), DRAWS))), side="right")
    found = np.bincount(kind, minlength=len(RARE) + 1)[:-1]
    want = DRAWS * np.array([p * count for p, count in RARE])
    assert (np.abs(found - want) < 3 * np.sqrt(want)).all(), (found, want)


def test_noise_is_as_often_large_as_it_should_and_larger_than_usual_noise_can_be():
    count = 2**25
    noise = jax.jit(lambda key: gumbel(key, (count,)))(jax.random.key(1))
    for p in (1e-4, 1e-5, 1e-6):
        found, want = int((noise > -np.log(-np.log1p(-p))).sum()), p * count
        assert abs(found - want) < 3 * np.sqrt(want), p
    assert noise.max() > 15.95


@pytest.mark.parametrize(("p", "missing"), [(1e-4, 0.0012), (1e-6, 0.112)])
def test_by_how_much_noise_that_ends_makes_a_code_too_rare(p, missing):
    """In closed form, for noise that ends as JAX's usual one, and as that which codes are drawn with."""
    usual, ours = (1 - cut(np.array([p, 1 - p]), largest)[0] / p for largest in (15.9424, 32.0))
    np.testing.assert_allclose(usual, missing, rtol=0.02)
    assert abs(ours) < 1e-6


def test_bfloat16_would_break_it():
    """Noise in bfloat16 ends below 6, so that codes less likely than 1 in 400 would vanish; and logits are off by 3%."""
    noise = jax.random.gumbel(jax.random.key(0), (2**16,), jnp.bfloat16)
    assert 4 < float(noise.max()) < 6.5
    assert gumbel(jax.random.key(0), (4,)).dtype == jnp.float32
    exact = np.log(np.float32(1e-6) * np.linspace(0.5, 1, 1000, dtype=np.float32))
    off = np.exp(np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float32) - exact) - 1
    assert 0.02 < np.abs(off).max() < 0.04
    logits = jnp.zeros((1, 1, 4), jnp.bfloat16)
    drawn = functools.partial(draw, keys=jax.random.split(jax.random.key(0), (1, 1)), temperature=jnp.ones(()))
    np.testing.assert_array_equal(drawn(logits), drawn(logits.astype(jnp.float32)))  # the sum is float32
