import os
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from ar_jax.nets.resize import area_matrix, bicubic_matrix, linear_matrix, resize

ROOT = pathlib.Path(os.environ.get("AR_JAX_PARITY", pathlib.Path(__file__).parents[2] / "shared" / "parity"))


def test_bicubic_doubling_has_the_kernel_of_a_quarter_pixel():
    a = -0.75
    far = lambda u: a * u**3 - 5 * a * u**2 + 8 * a * u - 4 * a  # noqa: E731
    near = lambda u: (a + 2) * u**3 - (a + 3) * u**2 + 1  # noqa: E731
    np.testing.assert_allclose(bicubic_matrix(16, 8)[7, 2:6], [far(1.25), near(0.25), near(0.75), far(1.75)], atol=1e-6)


@pytest.mark.parametrize("matrix", [area_matrix, bicubic_matrix, linear_matrix])
@pytest.mark.parametrize(("n", "m"), [(9, 5), (3, 6), (4, 1), (16, 24), (7, 7)])
def test_constant_images_stay_constant(matrix, n, m):
    np.testing.assert_allclose(matrix(n, m).sum(1), 1, atol=1e-6)


def test_area_bins_overlap_where_sizes_do_not_divide():
    np.testing.assert_allclose(
        area_matrix(3, 5), [[1 / 2, 1 / 2, 0, 0, 0], [0, 1 / 3, 1 / 3, 1 / 3, 0], [0, 0, 0, 1 / 2, 1 / 2]]
    )


def test_linear_resizing_takes_the_two_pixels_beside_a_place():
    np.testing.assert_allclose(linear_matrix(4, 2), [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    np.testing.assert_allclose(linear_matrix(2, 6), [[0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0]])


def test_both_axes_are_resized_and_other_kinds_refused():
    image = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 6, 3)), jnp.float32)
    assert resize(image, (8, 3)).shape == (2, 8, 3, 3)
    np.testing.assert_allclose(resize(image, (2, 3), "area"), image.reshape(2, 2, 2, 3, 2, 3).mean((2, 4)), atol=1e-6)
    assert resize(image, (4, 6)) is image
    with pytest.raises(ValueError, match="resize kind is 'nearest'; it must be one of bicubic, linear, area"):
        resize(image, (8, 8), "nearest")


CASES = {
    "bicubic_up": (9, 8),
    "bicubic_down": (3, 2),
    "bicubic_from_1x1": (4, 4),
    "area_down": (3, 4),
    "area_up": (7, 11),
}


@pytest.mark.parametrize("name", CASES)
def test_parity(name):
    path = ROOT / "var_vqvae" / "io.safetensors"
    if not path.exists():
        pytest.skip(f"no fixture at {path}; set AR_JAX_PARITY to the folder that holds the parity fixtures")
    io = load_file(path)
    image = np.moveaxis(io["resize_in"], 1, -1)
    want = np.moveaxis(io[f"resize_{name}"], 1, -1)
    if name == "bicubic_from_1x1":
        image = image[:, :1, :1]
    got = resize(jnp.asarray(image), want.shape[1:3], name.split("_")[0])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
