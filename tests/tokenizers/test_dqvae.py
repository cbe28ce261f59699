"""DQ-VAE's tokenizer: two densities, what decides between them, and codes that follow averages."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import random_params

from ar_jax.convert.sources import param_shapes
from ar_jax.tokenizers.dqvae import DQVAE, budget_loss, entropy_threshold, patch_entropy
from ar_jax.tokenizers.quantize import Codebook
from ar_jax.tokenizers.quantize_averaged import Average, centres, followed, restarted
from ar_jax.tokens import TokenSpec, grid
from ar_jax.train import codes
from ar_jax.train.state import TrainState

SMALL = DQVAE((4, 8), features=4, mult=(1, 2), res_blocks=0, latent=4, codes=9, code_features=3, groups=2, attention=())
RANDOM = np.random.default_rng(0)


def test_a_cell_has_one_code_or_four_and_decoding_gives_the_reconstruction_back():
    params, image = random_params(SMALL, 0.6), RANDOM.uniform(-1, 1, (3, 4, 8, 3)).astype(np.float32)

    def run(self):
        recon, losses, seen = self.autoencode(image)
        drawn = self.autoencode(image, key=jax.random.key(0))
        return self.encode(image), recon, self.decode(seen["tokens"]), losses, seen, drawn[1], drawn[2]["fine"]

    tokens, recon, decoded, losses, seen, with_key, drawn = jax.jit(
        lambda params: SMALL.apply({"params": params}, method=run)
    )(params)
    np.testing.assert_array_equal(tokens, seen["tokens"])
    np.testing.assert_allclose(recon, decoded, atol=1e-5)
    assert SMALL.spec.scales == ((2, 4), (4, 8))
    cells, places = np.asarray(tokens)[:, :8, 0] < 9, np.asarray(tokens)[:, 8:, 0].reshape(3, 2, 2, 4, 2) < 9
    np.testing.assert_array_equal(places.sum((2, 4)), np.where(cells.reshape(3, 2, 4), 0, 4))
    np.testing.assert_array_equal(cells.reshape(3, 2, 4), ~np.asarray(seen["fine"]))
    assert 0 < cells.sum() < cells.size
    assert (losses.keys(), with_key.keys()) == ({"codebook", "commit"}, {"codebook", "commit", "budget"})
    assert (np.asarray(drawn) != np.asarray(seen["fine"])).any(), "training draws"
    vectors, index = seen["members"]["codebook"]
    assert (vectors.shape, index.shape) == ((3 * 32, 3), (3 * 32,))


def test_the_budget_counts_codes():
    """Of 4 cells each: one is fine, three are; (7 + 13) / 2 codes are half of the way from 4 to 16."""
    fine = np.array([[[1, 0], [0, 0]], [[1, 1], [0, 1]]])
    gate = jax.nn.one_hot(fine, 2)
    for ratio in (0.5, 0.2):
        np.testing.assert_allclose(budget_loss(gate, ratio), 2 * (0.5 - ratio) ** 2, atol=1e-7)


def test_entropy_is_that_of_the_histogram_and_its_threshold_divides_as_asked():
    image = np.zeros((1, 4, 8, 3), np.float32) - 1
    image[:, :, 4:] = np.linspace(-1, 1, 32)[RANDOM.permutation(32)[:16]].reshape(4, 4, 1)
    found = np.asarray(patch_entropy(image, 4))[0, 0]
    np.testing.assert_allclose(found, [0, np.log(16)], atol=1e-3)
    many = RANDOM.uniform(-1, 1, (5, 16, 16, 3)).astype(np.float32)
    above = np.asarray(patch_entropy(many, 4)) > entropy_threshold(many, 4, 0.3)
    np.testing.assert_allclose(above.mean(), 0.3, atol=0.02)


def test_codes_follow_averages_and_rare_ones_begin_anew():
    """As the formulas of the paper, vector by vector; in training both parameters and their average take the new table."""
    average = Average(decay=0.9, rare=0.3)
    sizes, sums = np.array([2.0, 0.1, 1.0], np.float32), RANDOM.normal(size=(3, 2)).astype(np.float32)
    vectors, index = RANDOM.normal(size=(6, 2)).astype(np.float32), np.array([0, 0, 2, 0, 2, 0])
    n, s = 0.9 * sizes, 0.9 * sums
    for vector, i in zip(vectors, index):
        n[i] += 0.1
        s[i] += 0.1 * vector
    after = followed(sizes, sums, vectors, jnp.asarray(index), 0.9)
    np.testing.assert_allclose(after[0], n, rtol=1e-5)
    np.testing.assert_allclose(after[1], s, rtol=1e-5)
    again = restarted(*after, vectors[:3], 0.3)
    n[1], s[1] = 1, vectors[1]
    np.testing.assert_allclose(again[1], s, rtol=1e-5)
    want = s / (n.sum() * (n + 1e-5) / (n.sum() + 3e-5))[:, None]
    np.testing.assert_allclose(centres(*again, 1e-5), want, rtol=1e-5)

    stub = types.SimpleNamespace(
        spec=TokenSpec(grid(1, 3), codes=(3,)), codebooks=(Codebook("deep/table", average=average),)
    )
    params = {"deep": {"table": jnp.zeros((3, 2)), "other": jnp.ones(2)}}
    extra = codes.begin(stub, params, reset=False)
    seen = {"tokens": index.reshape(2, 3, 1), "members": {"deep/table": (jnp.asarray(vectors), jnp.asarray(index))}}
    extra, _ = codes.track(extra, seen, stub)
    none = jnp.zeros((), jnp.int32)
    state = TrainState(none, {"model": params}, params, None, extra, none, none)
    state = codes.renew(state, jax.random.key(0), stub, 0)
    table = np.asarray(state.params["model"]["deep"]["table"])
    np.testing.assert_array_equal(state.ema["deep"]["table"], table)
    np.testing.assert_array_equal(state.params["model"]["deep"]["other"], 1)
    assert all(np.abs(vectors - row).sum(1).min() < 1e-3 or i in (0, 2) for i, row in enumerate(table)), "1 is a vector"
    np.testing.assert_allclose(table[0], vectors[index == 0].mean(0), rtol=1e-3)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"losses\.reset_after is 5, but the codes of DQVAE are averages of vectors"):
        codes.check_reset(SMALL, 5)
    with pytest.raises(ValueError, match=r"tokenizer\.size must be multiples of 2 pixels, got \(5, 8\)"):
        _ = SMALL.clone(size=(5, 8)).spec
    with pytest.raises(ValueError, match=r"tokenizer\.router is 'edges'; it must be features or entropy"):
        param_shapes(SMALL.clone(router="edges"))
    with pytest.raises(
        ValueError, match=r"tokenizer\.mult is \(1, 2\) and decoder_mult \(1, 2\); the encoder has two levels"
    ):
        param_shapes(SMALL.clone(decoder_mult=(1, 2)))
    vectors = jnp.zeros((1, 40, 3))
    with pytest.raises(ValueError, match=r"DQVAE decodes codes, not vectors in their place"):
        jax.eval_shape(lambda params: SMALL.apply({"params": params}, vectors, method="decode"), param_shapes(SMALL))
