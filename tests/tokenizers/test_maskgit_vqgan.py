import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.tokenizers.maskgit_vqgan import MaskgitVQGAN, ResBlock

SMALL = MaskgitVQGAN((8, 12), features=4, mult=(1, 2), res_blocks=1, codes=16, code_features=6, groups=2)


@functools.cache
def ran():
    """What the tokenizer makes of two images, by name."""
    image = jax.random.uniform(jax.random.key(2), (2, 8, 12, 3), minval=-1, maxval=1)

    def run(self):
        recon, losses, seen = self.autoencode(image)
        tokens = self.encode(image)
        codes = self.embed(tokens).reshape(2, 4, 6, 6)
        return {
            "recon": recon, "tokens": tokens, "codes": codes, "losses": losses, "seen": seen,
            "again": self.quantise(codes)[1], "encoder": self.encoder((image + 1) / 2), "decoder": self.decoder(codes),
            "decoded": self.decode(tokens),
        }  # fmt: skip

    return jax.jit(lambda key: SMALL.apply({"params": SMALL.init_params(key)}, method=run))(jax.random.key(0))


def test_a_block_that_changes_the_channels_forgets_its_input():
    """With a branch of zeros only an input that came through would show."""
    x = jax.random.normal(jax.random.key(1), (1, 4, 4, 4))
    for features, kept in ((4, True), (6, False)):
        block = ResBlock(features, 2, jnp.float32)
        params = jax.jit(block.init)(jax.random.key(0), x)["params"]
        params["conv2"]["kernel"] = jnp.zeros_like(params["conv2"]["kernel"])
        np.testing.assert_array_equal(
            jax.jit(block.apply)({"params": params}, x), x if kept else jnp.zeros((1, 4, 4, 6))
        )
        assert ("nin_shortcut" in params) != kept
        assert not any("bias" in params[name] for name in params if "norm" not in name)


def test_images_in_minus_one_to_one_pass_networks_that_work_on_zero_to_one():
    found = ran()
    np.testing.assert_array_equal(found["seen"]["latents"], found["encoder"])
    np.testing.assert_allclose(found["recon"], 2 * found["decoder"] - 1, atol=1e-5)
    np.testing.assert_allclose(found["decoded"], 2 * found["decoder"] - 1, atol=1e-5)
    assert found["recon"].shape == (2, 8, 12, 3)


def test_codes_survive_and_the_codebook_is_pulled_a_quarter_as_much():
    found = ran()
    assert found["tokens"].shape == (2, SMALL.spec.n, 1) == (2, 24, 1)
    np.testing.assert_array_equal(found["again"].reshape(2, -1, 1), found["tokens"])
    np.testing.assert_array_equal(found["seen"]["tokens"], found["tokens"])
    square = np.square(found["codes"] - found["seen"]["latents"]).mean()
    losses = found["losses"]
    np.testing.assert_allclose([losses["codebook"], losses["commit"]], [square / 4, square], rtol=1e-5)


def test_projections_that_it_does_not_have_are_refused():
    with pytest.raises(ValueError, match=r"tokenizer\.latent is 32, but MaskgitVQGAN has no projections"):
        jax.eval_shape(SMALL.clone(latent=32).init_params, jax.random.key(0))
