"""Open-MAGVIT2's tokenizer, and the adversarial losses that came with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.nets.patchgan import PatchGan
from ar_jax.tokenizers.lookup_free import LookupFree, depth_to_space
from ar_jax.train.losses import ADVERSARIAL, Losses
from ar_jax.train.tokenizer import tokenizer_gradients

SMALL = LookupFree((8, 12), features=4, mult=(1, 2), res_blocks=1, bits=(2, 3), groups=2)


def test_codes_survive_and_are_the_same_shared_out_in_another_way():
    image = jax.random.uniform(jax.random.key(2), (2, 8, 12, 3), minval=-1, maxval=1)

    @jax.jit
    def run(key):
        params = {"params": SMALL.init_params(key)}
        recon, losses, seen = SMALL.apply(params, image, method="autoencode")
        codes = SMALL.apply(params, seen["tokens"], method="embed")
        again = SMALL.apply(params, codes, method="quantise")[1]
        one = SMALL.clone(bits=(5,)).apply(params, seen["latents"], method="quantise")[1]
        return recon, losses, seen, codes, again, one

    recon, losses, seen, codes, again, one = run(jax.random.key(0))
    assert recon.shape == (2, 8, 12, 3)
    assert losses.keys() == {"commit", "entropy"}
    assert seen["tokens"].shape == (2, SMALL.spec.n, 2)
    assert SMALL.spec.codes == (4, 8)
    np.testing.assert_array_equal(np.unique(codes), [-1, 1])
    np.testing.assert_array_equal(again, seen["tokens"])
    np.testing.assert_array_equal(one.reshape(2, -1), seen["tokens"][..., 0] + 4 * seen["tokens"][..., 1])


def test_depth_goes_to_space_two_rows_by_two_columns():
    x = jnp.arange(8).reshape(1, 1, 1, 8).astype(jnp.float32)
    np.testing.assert_array_equal(depth_to_space(x)[0], [[[0, 1], [2, 3]], [[4, 5], [6, 7]]])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": (31,)}, r"bits is \(31,\); it must be the bits of each sub-code, 1 to 30"),
        ({"size": (2, 2)}, r"tokenizer\.size is \(2, 2\), a single latent of 2 pixels a side; the decoder needs"),
        ({"size": (7, 8)}, r"tokenizer\.size must be multiples of 2 pixels, got \(7, 8\)"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        _ = SMALL.clone(**fields).spec


def test_averages_of_the_logits_are_kept_over_updates():
    """LeCAM, at the seam where a tokenizer is trained."""
    assert ADVERSARIAL.keys() >= {"averaged", "hinge_averaged"}
    judge = PatchGan(base_channels=4, num_layers=1)
    losses = Losses(
        lpips=0.0, adversarial=0.1, adversarial_start=0, adversarial_kind="hinge_averaged", lecam=0.05, judge=judge
    )
    batch, key = {"image": np.random.default_rng(0).integers(0, 256, (2, 8, 12, 3), dtype=np.uint8)}, jax.random.key(0)

    @jax.jit
    def run(average):
        params, stats = {"model": SMALL.init_params(key)}, judge.init_stats()
        params["discriminator"] = judge.init(key, jnp.zeros((1, 8, 12, 3)), stats, True)["params"]
        extra = {"age": jnp.zeros(12, jnp.int32), "frequency": jnp.zeros((1, 12)), "stats": stats, "lecam": average}
        grads, extra, metrics = tokenizer_gradients(SMALL, losses)(params, extra, {}, batch, key, 0)
        return grads["discriminator"], extra["lecam"], metrics

    grads, average, metrics = run(jnp.zeros(2))
    seen = np.array([metrics[f"logits_{kind}"] for kind in ("real", "fake")])
    np.testing.assert_allclose(average, 0.001 * seen, rtol=1e-4)
    others, average, _ = run(jnp.array([9.0, -9.0]))
    np.testing.assert_allclose(average, 0.999 * np.array([9, -9]) + 0.001 * seen, rtol=1e-4)
    assert jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), grads, others))[0] > 0
