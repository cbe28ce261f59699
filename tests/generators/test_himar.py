"""Hi-MAR: its order and guidance, what its networks do not see, what is refused, images encoded at several sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases_continuous import CASES, INFO
from flax.traverse_util import flatten_dict
from trees import initial_params

from ar_jax.generators.himar import ByResolution, Resolutions
from ar_jax.heads.joint_diffusion import JointDiffusion
from ar_jax.machine.sharding import MeshShape, make_mesh, shard
from ar_jax.nets.resize import resize
from ar_jax.tokenizers.image_pyramid import ImagePyramid
from ar_jax.tokenizers.kl_vae import KLVAE
from ar_jax.tokens import TokenSpec, grid, pyramid


def test_pivots_come_first_and_steps_of_both_kinds_share_no_loop():
    spec = TokenSpec(pyramid((2, 4)), channels=3)
    order = Resolutions(4, 4, scans=1)(spec, jax.random.split(jax.random.key(0), 3), 3)
    assert (order.sizes, order.rooms) == ((1, 1, 1, 1, 2, 3, 5, 6), (1, 1, 1, 1, 6, 6, 6, 6))
    assert (np.sort(order.slot[:, :4]) == np.arange(4)).all()
    assert (np.sort(order.slot) == np.arange(20)).all()
    assert len(np.unique(order.slot[:, 4:], axis=0)) == 3
    rooms = Resolutions(16, 4, scans=1)(spec, jax.random.split(jax.random.key(0), 3), 3).rooms
    assert rooms[:4] == (1, 1, 1, 2)
    weight = ByResolution(3.0, 2.0)(order, spec)
    np.testing.assert_allclose(weight, [1.25, 1.5, 1.75, 1.75, 1.25, 1.625, 2.25, 2.875])


def test_what_is_not_known_is_not_seen_and_images_that_are_not_told_see_no_pivots():
    case = CASES["himar"]
    order, call = case.ordered(), functools.partial(case.generator.apply, {"params": case.params})
    cond = call(case.batch, jnp.zeros(case.images, bool), method="condition")
    said = np.random.default_rng(0).normal(size=(case.images, 4, 24)).astype(np.float32)
    told = jnp.array([True, False, True, False])[:, None]

    @jax.jit
    def look(said, tokens):
        h = call(tokens[:, :4], 1, cond, order, method="hidden_pivots")
        rows = call(said, told & jnp.ones(4, bool), order, method="pivot_rows")
        return h, call(rows, tokens[:, 4:], 5, cond, order, method="hidden_others")

    first, second = look(said, case.tokens)
    unknown = np.isin(np.arange(16), [1, 2, 3, *range(9, 16)])
    again = look(said, np.where(unknown[:, None], 1e3, case.tokens))
    np.testing.assert_array_equal(again[0], first)
    np.testing.assert_array_equal(again[1], second)
    other = look(said + 1, case.tokens)[1]
    assert (np.abs(other - second).max((1, 2)) > 1e-4).tolist() == told[:, 0].tolist()


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            lambda: CASES["himar"].generator.complete(TokenSpec(grid(3, 4), channels=3), INFO),
            r"two full grids, pivots first, but the tokenizer has 12 in \(\(3, 4\),\); use ImagePyramid",
        ),
        (
            lambda: CASES["himar"].generator.complete(TokenSpec(pyramid((2, 3)), codes=(5,)), INFO),
            r"HiMar needs continuous tokens, but the tokenizer gives codes \(5,\)",
        ),
        (
            lambda: JointDiffusion(20, 1, 3).complete(TokenSpec(grid(2, 2), channels=3)),
            r"width is 20; it must be a multiple of heads, 3",
        ),
    ],
)
def test_what_does_not_fit_is_refused(ask, message):
    with pytest.raises(ValueError, match=message):
        ask()


def test_tensor_parallelism_divides_networks_and_heads():
    case = CASES["himar"]
    shardings = shard(case.params, make_mesh(MeshShape(1, 1, 2), jax.devices()[:2]), case.generator.rules)
    divided = {
        "/".join(path) for path, where in flatten_dict(shardings).items() if not where.is_fully_replicated
    }  # fmt: skip
    assert {
        *(f"{net}/blocks/{part}/kernel" for net in ("encoder", "decoder", "joint_head/net") for part in ("qkv", "out", "fc1", "fc2")),
        *(f"head/net/blocks/{part}/kernel" for part in ("fc1", "fc2")),
    } <= divided


def test_an_image_pyramid_encodes_smaller_images_and_draws_the_same_from_moments():
    base = KLVAE((8, 8), features=4, mult=(1, 2), res_blocks=1, latent=2, groups=2, shift=(0.1, 0.2))
    module, image = ImagePyramid(base, (2, 4)), jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    params = initial_params(module)

    @jax.jit
    def run(params):
        call = functools.partial(module.apply, {"params": params})
        small = base.clone(size=(4, 4)).apply({"params": params}, resize(image, (4, 4)), method="encode")
        key = jax.random.key(1)
        tokens = call(image, key=key, method="encode")
        return call(image, method="encode"), small, tokens, call(call(image, method="moments"), key=key, method="drawn")

    means, small, tokens, drawn = run(params)
    assert means.shape == (2, 20, 2)
    np.testing.assert_allclose(means[:, :4], small, atol=1e-6)
    np.testing.assert_allclose(drawn, tokens, atol=1e-6)
    assert (np.abs(tokens - means) > 1e-6).mean() > 0.9
