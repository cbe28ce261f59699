import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.nets import patchgan
from ar_jax.nets.patchgan import PatchGan, patchgan_params

NET = PatchGan(base_channels=3, num_layers=2)


def images(b=2, side=16, seed=0):
    return jax.random.normal(jax.random.key(seed), (b, side, side + 4, 3))


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: NET.init(jax.random.key(1), images(), NET.init_stats(), True))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), shapes)


def test_published_size():
    net = PatchGan()
    image, key = jnp.zeros((1, 256, 256, 3)), jax.random.key(0)
    shapes = jax.eval_shape(lambda: net.init(key, image, net.init_stats(), True))
    # 4x4 kernels, the biases of the first and last one, two numbers per normalised channel
    kernels = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == kernels + 64 + 1 + 2 * (128 + 256 + 512)
    out, _ = jax.eval_shape(lambda p: net.apply(p, image, net.init_stats(), True), shapes)
    assert out.shape == (1, 30, 30, 1)


def test_statistics_are_results(params):
    stats, judge = NET.init_stats(), jax.jit(NET.apply, static_argnums=3)
    logits, new = judge(params, images(), stats, True)
    assert logits.shape == (2, 2, 3, 1)
    assert jax.tree.structure(new) == jax.tree.structure(stats)
    again, same = judge(params, images(), new, False)
    jax.tree.map(np.testing.assert_array_equal, same, new)
    assert jnp.abs(logits - again).max() > 1e-3
    np.testing.assert_array_equal(judge(params, images(), new, True)[0], logits)  # only the batch matters


def moved(x, stats):
    params = {"params": {"scale": np.ones(5, "f4"), "bias": np.zeros(5, "f4")}}
    return jax.jit(lambda x: patchgan.BatchNorm(1e-5).apply(params, x, stats, True)[1])(x)


def test_running_statistics_by_hand():
    x = np.random.default_rng(0).normal(1, 3, (2, 3, 4, 5)).astype("f4")
    new = moved(x, {"mean": np.full(5, 2.0, "f4"), "var": np.full(5, 3.0, "f4")})
    np.testing.assert_allclose(new["mean"], 0.9 * 2 + 0.1 * np.mean(x, (0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(new["var"], 0.9 * 3 + 0.1 * np.var(x, (0, 1, 2), ddof=1), rtol=1e-5)


def test_running_statistics_follow_torch():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype("f4")
    theirs = torch.nn.BatchNorm2d(5)
    theirs(torch.from_numpy(x).permute(0, 3, 1, 2))
    new = moved(x, {"mean": np.zeros(5, "f4"), "var": np.ones(5, "f4")})
    np.testing.assert_allclose(new["mean"], theirs.running_mean, atol=1e-6)
    np.testing.assert_allclose(new["var"], theirs.running_var, atol=1e-6)


def test_weights_round_trip(params):
    weights = {
        "main.0.weight": np.zeros((3, 3, 4, 4)),
        "main.0.bias": np.zeros(3),
        "main.2.weight": np.zeros((6, 3, 4, 4)),
        "main.5.weight": np.zeros((12, 6, 4, 4)),
        "main.8.weight": np.zeros((1, 12, 4, 4)),
        "main.8.bias": np.zeros(1),
    }
    for i, c in (3, 6), (6, 12):
        names = "weight", "bias", "running_mean", "running_var"
        weights |= {f"main.{i}.{name}": np.ones(c) for name in names}
        weights[f"main.{i}.num_batches_tracked"] = np.array(3)
    read, stats = patchgan_params(weights)
    assert jax.tree.map(np.shape, read) == jax.tree.map(np.shape, params)
    assert jax.tree.map(np.shape, stats) == jax.tree.map(np.shape, NET.init_stats())
    with pytest.raises(ValueError, match="main"):
        patchgan_params({"x": np.zeros(2)})


def test_losses_by_hand():
    real, fake = jnp.array([2.0, 0.0]), jnp.array([-2.0, 1.0])
    assert patchgan.hinge_discriminator(real, fake) == 0.5 * (0.5 + 1.0)
    assert patchgan.hinge_generator(fake) == 0.5
    np.testing.assert_allclose(
        patchgan.vanilla_discriminator(real, fake), (np.log1p(np.exp([-2, 0, -2, 1])).sum()) / 4, rtol=1e-6
    )
    np.testing.assert_allclose(patchgan.non_saturating_generator(fake), np.log1p(np.e) + 0.5, rtol=1e-6)
    np.testing.assert_allclose(
        patchgan.non_saturating_discriminator(real, fake), 0.5 * (np.log1p(np.e) - 1 + np.log(2)), rtol=1e-6
    )


def test_initial_values():
    init = jax.jit(PatchGan(num_layers=1).init, static_argnums=3)
    first = init(jax.random.key(0), images(), PatchGan(num_layers=1).init_stats(), True)["params"]
    assert 0.018 < first["conv1"]["kernel"].std() < 0.022
    assert 0.01 < jnp.abs(first["conv0"]["bias"]).max() <= (16 * 3) ** -0.5
    assert jnp.abs(first["norm1"]["scale"] - 1).max() < 0.1
    assert (first["norm1"]["bias"] == 0).all()
