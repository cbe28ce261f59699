"""RobustTok's perturbation: which tokens change, by what plan, and that training tells it the update."""

import jax
import numpy as np
import pytest

from ar_jax.config import Losses
from ar_jax.convert.sources import param_shapes
from ar_jax.tokenizers.quantize_perturbed import annealed, perturb
from ar_jax.tokenizers.robust_vqgan import RobustVQGAN
from ar_jax.train import codes
from ar_jax.train.tokenizer import tokenizer_gradients

SMALL = RobustVQGAN(
    (4, 4), features=4, mult=(1, 2), res_blocks=0, latent=4, codes=8, code_features=3, groups=2, beta=0.5, delta=8, start=2,
    end=6, least=0.5,
)  # fmt: skip
RANDOM = np.random.default_rng(0)


def test_tokens_of_the_first_images_take_one_of_their_nearest_codes():
    table, z = RANDOM.normal(size=(9, 3)).astype(np.float32), RANDOM.normal(size=(4, 5, 3)).astype(np.float32)
    uniform, neighbour = RANDOM.random((4, 5), np.float32), RANDOM.integers(0, 4, (4, 5)).astype(np.int32)
    plain = np.zeros_like(z)
    found = jax.jit(lambda z: perturb(z, plain, table, uniform, neighbour, 0.5, 0.6, 4))(z)
    nearest = np.square(z[:, :, None] - table).sum(-1).argsort(-1)
    which = np.where(uniform > 0.5, 0, neighbour)
    want = table[np.take_along_axis(nearest, which[..., None], -1)[..., 0]]
    np.testing.assert_allclose(found[:2], want[:2], atol=1e-6)
    assert not found[2:].any(), "0.6 of four images are two"
    assert not perturb(z[:1], plain[:1], table, uniform[:1], neighbour[:1], 1.0, 0.6, 4).any(), "of one image none"
    np.testing.assert_allclose(annealed(np.array([0.0, 40, 80, 120, 999]), 40, 120, 0.5), [1, 1, 0.75, 0.5, 0.5])


def test_training_perturbs_by_the_plan_at_its_update_and_reconstruction_does_not():
    params = jax.tree.map(lambda x: RANDOM.normal(0, 0.5, x.shape).astype(np.float32), param_shapes(SMALL))
    image = RANDOM.integers(0, 256, (4, 4, 4, 3)).astype(np.uint8)
    grad_fn = tokenizer_gradients(SMALL, Losses(lpips=0.0, adversarial=0.0))
    extra = codes.begin(SMALL, params, reset=False)

    @jax.jit
    def run(params, step):
        seen = grad_fn({"model": params}, extra, {}, {"image": image}, jax.random.key(1), step)[2]
        z = SMALL.apply({"params": params}, image / 127.5 - 1, method="latents")
        plain = SMALL.apply({"params": params}, z, method="quantise")[0]
        many = jax.vmap(lambda key: SMALL.apply({"params": params}, z, plain, key, step, method="perturbed"))(keys)
        return seen["reconstruction"], plain, many

    keys = jax.random.split(jax.random.key(2), 40)
    (early, plain, at_first), (late, _, at_last) = run(params, 0), run(params, 9)
    assert early != late
    changed = [(np.abs(some - plain) > 1e-6).any(-1) for some in (at_first, at_last)]
    assert not any(some[:, 2:].any() for some in changed)
    # alpha (1 - 1/delta): 1 and 8 neighbours, then a half and 4
    np.testing.assert_allclose([some[:, :2].mean() for some in changed], [7 / 8, 3 / 8], atol=0.08)


def test_plans_that_cannot_be_are_refused():
    build = lambda **fields: jax.eval_shape(SMALL.clone(**fields).init_params, jax.random.key(0))  # noqa: E731
    with pytest.raises(ValueError, match=r"tokenizer\.end is 2; the plan must end after tokenizer\.start, 2"):
        build(end=2)
    with pytest.raises(ValueError, match=r"tokenizer\.delta is 9, but there are 8 codes; give at most as many"):
        build(delta=9)
