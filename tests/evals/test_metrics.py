"""Closed forms, hand-made cases and scikit-image."""

import numpy as np
import pytest
from scipy.ndimage import correlate1d
from skimage import data
from skimage import metrics as skimage

from ar_jax.evals import metrics
from ar_jax.evals.metrics import Gaussian, Moments, frechet


@pytest.fixture(scope="module")
def rng():
    return np.random.default_rng(0)


def test_merged_moments_are_those_of_the_whole(rng):
    x = rng.normal(100, 1, (60, 5)).astype(np.float32)
    parts = Moments.of(x[:7]) + Moments.of(x[7:8]) + Moments.of(x[8:])
    np.testing.assert_allclose(parts.gaussian().covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-10)
    np.testing.assert_allclose(parts.mean, x.mean(0, dtype=np.float64), rtol=1e-12)


def test_frechet_distance_of_known_gaussians(rng):
    mean, a, b = rng.normal(size=(3, 40))
    turn, _ = np.linalg.qr(rng.normal(size=(40, 40)))
    one = Gaussian(np.zeros(40), turn @ np.diag(a**2) @ turn.T)
    two = Gaussian(mean, turn @ np.diag(b**2) @ turn.T)  # they commute
    assert frechet(one, two) == pytest.approx((mean**2).sum() + ((abs(a) - abs(b)) ** 2).sum(), rel=1e-10)
    assert abs(frechet(two, two)) < 1e-9


def test_frechet_distance_of_samples_nears_that_of_their_gaussians(rng):
    shift = np.array([1.0, 0, 0, 0])
    a, b = rng.normal(size=(2, 20000, 4))
    found = frechet(Moments.of(a).gaussian(), Moments.of(2 * b + shift).gaussian())
    assert found == pytest.approx(1 + 4, abs=0.1)


@pytest.mark.parametrize(("n", "m"), [(10, 12), (10, 60)])
def test_frechet_distance_of_sets_is_that_of_their_moments(rng, n, m):
    a, b = rng.normal(size=(n, 30)), rng.normal(1, 2, size=(m, 30))
    expected = frechet(Moments.of(a).gaussian(), Moments.of(b).gaussian())
    assert metrics.frechet_sets(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_fewer_images_than_features(rng):
    few = Moments.of(rng.normal(size=(10, 50))).gaussian()
    assert abs(frechet(few, few)) < 1e-9
    with pytest.raises(ValueError, match="at least 2 images"):
        Moments.of(np.zeros((1, 3))).gaussian()
    with pytest.raises(ValueError, match="same network"):
        frechet(few, Moments.of(np.zeros((3, 4))).gaussian())
    with pytest.raises(ValueError, match="NaN"):
        frechet(few, Gaussian(few.mean * np.nan, few.covariance))


def test_inception_score_of_known_classes():
    sure = 100 * np.eye(10)[np.arange(100) % 10]
    assert metrics.inception_score(sure, 10, shuffle=None)[0] == pytest.approx(10)
    assert metrics.inception_score(np.zeros((50, 7)), 5)[0] == pytest.approx(1)
    ordered = sure[np.argsort(np.arange(100) % 10)]  # consecutive splits of one class each
    assert metrics.inception_score(ordered, size=10)[0] == pytest.approx(1)
    assert metrics.inception_score(ordered, size=100)[0] == pytest.approx(10)
    with pytest.raises(ValueError, match="splits"):
        metrics.inception_score(sure[:5], 10)


def test_kernel_distance_of_points():
    a, b = np.array([[0.0], [0.0]]), np.array([[1.0], [1.0]])
    # within: 1 and (1 + 1)^3; between: 1
    assert metrics.kernel_distance(a, b, 3, 2) == pytest.approx((1 + 8 - 2, 0))
    with pytest.raises(ValueError, match="KID subsets have 3"):
        metrics.kernel_distance(a, b, 3, 3)


def test_balls_on_a_line():
    real = np.array([0.0, 1, 2, 10])[:, None]  # radii of the second neighbour: 2, 1, 2, 9
    fake = np.array([-2.0, 2.5, 4.1, 20])[:, None]  # radii of the second neighbour: 6.1, 4.5, 6.1, 17.5
    found = metrics.manifold(fake, real, k=2, density_k=2)
    # -2: in 0's ball. 2.5: in those of 2 and 10 (1..19). 4.1: 10. 20: none.
    assert found["precision"] == 3 / 4
    # 0: -2's ball reaches 4.1. All of 0, 1, 2 lie there; 10 in 20's (2.5..).
    assert found["recall"] == 1
    assert found["density"] == (1 + 2 + 1 + 0) / (2 * 4)
    assert found["coverage"] == 3 / 4  # nothing lies in 1's ball
    apart = metrics.manifold(fake + 1000, real, k=2, density_k=2)
    assert apart == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}
    with pytest.raises(ValueError, match="more than 5 images"):
        metrics.manifold(fake, real)


def test_equal_sets_are_precise_and_recalled_in_any_block_size(rng, monkeypatch):
    x, y = rng.normal(size=(2, 70, 6)).astype(np.float32)
    assert metrics.manifold(x, x) == {"precision": 1, "recall": 1, "density": pytest.approx(1, abs=0.3), "coverage": 1}
    whole = metrics.manifold(x, y)
    monkeypatch.setattr(metrics, "BLOCK", 16)
    assert metrics.manifold(x, y) == whole
    assert 0 < whole["precision"] < 1


@pytest.fixture(scope="module")
def pairs(rng):
    photo = data.astronaut()[:180, 100:280].astype(np.float32) / 255
    noisy = np.clip(photo + rng.normal(0, 0.1, photo.shape), 0, 1).astype(np.float32)
    return photo[None], noisy[None]


def test_psnr_and_ssim_are_scikit_images(pairs):
    a, b = pairs
    assert metrics.psnr(a, b)[0] == pytest.approx(skimage.peak_signal_noise_ratio(a, b, data_range=1), rel=1e-4)
    theirs = skimage.structural_similarity(
        a[0], b[0], channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1
    )
    assert metrics.ssim(a, b)[0] == pytest.approx(theirs, abs=1e-4)
    assert metrics.ssim(a, a)[0] == pytest.approx(1, abs=1e-5)
    assert np.isinf(metrics.psnr(a, a)[0])
    with pytest.raises(ValueError, match="at least 11"):
        metrics.ssim(a[:, :8], b[:, :8])


def test_ms_ssim_is_that_of_the_formula(pairs):
    a, b = (x[0].astype(np.float64) for x in pairs)
    window = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)

    def blur(x):
        for axis in (0, 1):
            x = correlate1d(x, window / window.sum(), axis, mode="reflect")
        return x[5:-5, 5:-5]

    expected = np.ones(3)
    for scale, weight in enumerate(metrics.MS_WEIGHTS):
        ma, mb = blur(a), blur(b)
        va, vb, vab = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
        term = (2 * vab + 9e-4) / (va + vb + 9e-4)
        if scale == 4:
            term = term * (2 * ma * mb + 1e-4) / (ma**2 + mb**2 + 1e-4)
        expected *= term.mean((0, 1)) ** weight
        a, b = (np.pad(x, ((0, len(x) % 2), (0, x.shape[1] % 2), (0, 0)), "edge") for x in (a, b))
        a, b = ((x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4 for x in (a, b))
    assert metrics.ms_ssim(*pairs)[0] == pytest.approx(expected.mean(), abs=1e-4)
    assert metrics.ms_ssim(pairs[0], pairs[0])[0] == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="161"):
        metrics.ms_ssim(pairs[0][:, :100], pairs[1][:, :100])


def test_codes_and_texts():
    assert metrics.code_use(np.array([5, 5, 5, 5])) == {"usage": 1, "perplexity": pytest.approx(4)}
    assert metrics.code_use(np.array([0, 9, 0, 0])) == {"usage": 0.25, "perplexity": pytest.approx(1)}
    assert metrics.bits_per_pixel(256, (16384,), (256, 256)) == pytest.approx(256 * 14 / 65536)
    assert metrics.bits_per_pixel(10, (4, 8), (10, 10)) == pytest.approx(0.5)
    assert metrics.edit_distance("kitten", "sitting") == 3
    assert metrics.edit_distance("", "abc") == 3
