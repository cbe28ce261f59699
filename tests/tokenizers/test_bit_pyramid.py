"""Infinity's tokenizer: bits scale by scale, patches of them, left-out scales, corrected mistakes, published lists."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import random_params

from ar_jax.heads.bitwise import Bitwise
from ar_jax.tokenizers.bit_pyramid import STAGES, BitPyramid, published_scales
from ar_jax.tokenizers.quantize_spherical import residual_spherical_quantise
from ar_jax.tokens import TokenSpec, grid, maps

NET = {"features": 4, "mult": (1, 2), "res_blocks": 0, "bits": 3, "groups": 2}
PLAIN = BitPyramid((8, 12), (1, (2, 3), (4, 6)), **NET)
PATCHED = BitPyramid((8, 12), (1, (2, 3)), patch=2, **NET)
IMAGE = np.clip(np.random.default_rng(2).normal(size=(2, 8, 12, 3)), -1, 1).astype(np.float32)


@functools.cache
def ran(tokenizer):
    def run(self):
        recon, losses, seen = self.autoencode(IMAGE)
        tokens, latents = self.encode(IMAGE), self.latents(IMAGE)
        none = [jnp.zeros((2, *size, 3), bool) for size in self.sizes]
        return {
            "recon": recon, "losses": losses, "seen": seen, "tokens": tokens, "decoded": self.decode(tokens),
            "sums": self.sums(tokens), "context": self.context(tokens), "latents": latents,
            "clean": self.corrected(latents, none), "flipped": self.corrected(latents, [none[0].at[0].set(True), *none[1:]]),
            "first": self.decode(tokens[:, :1]), "until": self.decode_until(tokens, 0),
        }  # fmt: skip

    return jax.jit(lambda params: tokenizer.apply({"params": params}, method=run))(random_params(tokenizer, 0.5))


@pytest.mark.parametrize("tokenizer", [PLAIN, PATCHED], ids=["plain", "patched"])
def test_training_decoding_and_teacher_forcing_agree(tokenizer):
    found, k = ran(tokenizer), 3 * tokenizer.patch**2
    assert tokenizer.spec.codes == (2,) * k
    assert found["tokens"].shape == (2, tokenizer.spec.n, k)
    np.testing.assert_array_equal(found["seen"]["tokens"], found["tokens"])
    np.testing.assert_allclose(np.clip(found["recon"], -1, 1), found["decoded"], atol=1e-4)
    np.testing.assert_array_equal(found["clean"][0], found["tokens"])
    np.testing.assert_allclose(found["clean"][1], found["context"], atol=1e-5)
    np.testing.assert_allclose(found["first"], found["until"], atol=1e-5)
    errors = [np.square(x - found["latents"]).mean() for x in found["sums"]]
    assert set(found["losses"]) == {"commit", "entropy"}
    assert len(errors) == len(tokenizer.scales)


def test_a_wrong_bit_changes_later_bits_only_and_only_of_its_image():
    clean, wrong = (maps(x, PLAIN.scales) for x in (ran(PLAIN)["clean"][0], ran(PLAIN)["flipped"][0]))
    np.testing.assert_array_equal(clean[0], wrong[0])
    assert (clean[1][0] != wrong[1][0]).any()
    np.testing.assert_array_equal(ran(PLAIN)["clean"][0][1], ran(PLAIN)["flipped"][0][1])


def test_bits_of_a_patch_lie_channel_by_channel():
    latents, tokens = ran(PATCHED)["latents"], ran(PATCHED)["tokens"]
    first = residual_spherical_quantise(latents, PATCHED.sizes[:1]).bits[0]  # 2x2 places
    np.testing.assert_array_equal(tokens[:, 0].reshape(2, 3, 2, 2), np.moveaxis(first, 3, 1))


def test_scales_that_are_left_out_add_nothing():
    latents = np.random.default_rng(3).normal(size=(2, 4, 6, 3)).astype(np.float32)
    said = residual_spherical_quantise(latents, PLAIN.sizes, kept=jnp.array([0.0, 0.0, 1.0]))
    alone = residual_spherical_quantise(latents, PLAIN.sizes[-1:])
    np.testing.assert_array_equal(said.total, alone.total)
    np.testing.assert_allclose(said.losses["commit"], alone.losses["commit"], rtol=1e-6)
    dropped = PLAIN.clone(scale_drop=1.0)
    shown = jax.jit(lambda params, key: dropped.apply({"params": params}, IMAGE, key=key, method="autoencode")[0])
    params = random_params(PLAIN, 0.5)
    assert np.abs(shown(params, jax.random.key(0)) - ran(PLAIN)["recon"]).max() > 1e-3


def test_published_scales_have_the_published_numbers_of_tokens():
    counts = [sum(h * w for h, w in published_scales((side, side))) for side in (256, 512, 768, 1024)]
    assert counts == [521, 2521, 6425, 10521]
    assert published_scales((320, 240)) == tuple(pair[::-1] for pair in published_scales((240, 320)))
    assert len(published_scales((320, 240))) == STAGES[0]
    assert published_scales((640, 640)) == published_scales((256, 272)) == ()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"last one times tokenizer\.patch 2 must be the latent's \(4, 6\)"):
        _ = PATCHED.clone(scales=(1, (4, 6))).spec
    with pytest.raises(ValueError, match=r"tokenizer\.bits is 0 and tokenizer\.patch 1; both must be 1 or more"):
        _ = PLAIN.clone(bits=0).spec
    with pytest.raises(ValueError, match=r"Bitwise needs tokens of sub-codes of one size.*\(2, 3\)"):
        Bitwise().complete(TokenSpec(grid(2, 2), codes=(2, 3)))
    with pytest.raises(ValueError, match=r"Bitwise needs tokens of sub-codes of one size.*\(\)"):
        Bitwise().complete(TokenSpec(grid(2, 2), channels=3))
