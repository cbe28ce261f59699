"""IBQ's tokenizer."""

import jax
import numpy as np
import pytest

from ar_jax.tokenizers.ibq import IBQ

SMALL = IBQ((8, 12), features=4, mult=(1, 2), res_blocks=1, latent=6, codes=11, code_features=5, groups=2)


def test_codes_are_chosen_by_inner_product_and_all_of_them_learn_from_the_image():
    image = jax.random.uniform(jax.random.key(2), (2, 8, 12, 3), minval=-1, maxval=1)

    @jax.jit
    def run(params):
        def loss(params):
            recon, losses, seen = SMALL.apply({"params": params}, image, method="autoencode")
            return (recon**2).mean(), (losses, seen)

        return jax.value_and_grad(loss, has_aux=True)(params)

    params = jax.jit(SMALL.init_params)(jax.random.key(0))
    (_, (losses, seen)), grads = run(params)
    assert losses.keys() == {"index", "commit", "codebook", "entropy"}
    want = (np.asarray(seen["latents"]) @ np.asarray(params["codebook"]).T).argmax(-1)
    np.testing.assert_array_equal(seen["tokens"], want.reshape(2, 24, 1))
    unused = np.setdiff1d(np.arange(11), want)
    assert len(unused)
    assert (np.abs(np.asarray(grads["codebook"])[unused]).max(-1) > 0).all()


def test_normalised_codes_are_refused():
    with pytest.raises(ValueError, match=r"tokenizer\.l2_norm is True, but IBQ takes latents and codes as they are"):
        jax.eval_shape(SMALL.clone(l2_norm=True).init_params, jax.random.key(0))
