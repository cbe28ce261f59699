"""Metrics as pure functions of features, statistics and images; float64 in numpy where digits are lost otherwise."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import lax

from ar_jax.typing import Array, Float, typed

BLOCK = 4096  # rows of features compared at a time


# Sets of features ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Moments:
    """Count, mean and scatter of feature vectors, float64; merging is exact up to rounding, in any order.

    Attributes:
      count: number of vectors.
      mean: [d].
      scatter: [d d], sum of outer products of the deviations from the mean.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        """Of features [n d]."""
        features = np.asarray(features, np.float64)
        mean = features.mean(0)
        deviation = features - mean
        return cls(len(features), mean, deviation.T @ deviation)

    def __add__(self, other: "Moments") -> "Moments":
        count = self.count + other.count
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        between = np.outer(shift, shift) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    def gaussian(self) -> "Gaussian":
        """The covariance is normalised by count - 1, as by all the field's tools.

        Raises:
          ValueError: fewer than two vectors.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        return Gaussian(self.mean, self.scatter / (self.count - 1))


@dataclasses.dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean [d] and covariance [d d], float64."""

    mean: np.ndarray
    covariance: np.ndarray

    @functools.cached_property
    def root(self) -> np.ndarray:
        """The symmetric root of the covariance; eigenvalues below 0, of rounding, count as 0."""
        values, vectors = scipy.linalg.eigh((self.covariance + self.covariance.T) / 2)
        return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def frechet(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet distance, |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    The trace of the root is the sum of the singular values of C1^(1/2) C2^(1/2): float64, real, and exact also for
    covariances of fewer images than dimensions, where a matrix square root of the product breaks down.

    Raises:
      ValueError: shapes that do not fit, or numbers that are not finite.
    Source: arXiv:1706.08500.
    """
    if a.mean.shape != b.mean.shape or a.covariance.shape != b.covariance.shape:
        raise ValueError(
            f"Gaussians of {a.mean.shape} and {b.mean.shape} dimensions cannot be compared; are they features of the same "
            "network?"
        )
    if not all(np.isfinite(x).all() for one in (a, b) for x in (one.mean, one.covariance)):
        raise ValueError("a mean or covariance holds NaN or infinity")
    trace = scipy.linalg.svdvals(a.root @ b.root).sum()
    return float(((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * trace)


def frechet_sets(a: np.ndarray, b: np.ndarray) -> float:
    """The same between features [n d] and [m d]; quick where there are fewer of them than dimensions.

    With covariances A'A and B'B of centred features, the singular values are those of A B', an n by m matrix.
    """
    if max(len(a), len(b)) > a.shape[1]:
        return frechet(Moments.of(a).gaussian(), Moments.of(b).gaussian())
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a covariance needs at least 2 images, got {min(len(a), len(b))}")
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    mean_a, mean_b = a.mean(0), b.mean(0)
    a, b = ((x - mean) / np.sqrt(len(x) - 1) for x, mean in ((a, mean_a), (b, mean_b)))
    trace = scipy.linalg.svdvals(a @ b.T).sum()
    return float(((mean_a - mean_b) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * trace)


def inception_score(
    logits: np.ndarray, splits: int = 10, size: int = 0, shuffle: int | None = None
) -> tuple[float, float]:
    """Mean and standard deviation over splits of exp(mean KL of p(class | image) to the split's mean).

    Args:
      logits: [n classes].
      splits: number of splits of about equal size, as torch-fidelity has 10.
      size: images in a split instead, consecutive; the last may be smaller. The ADM evaluator has 5000.
      shuffle: seed of numpy's RandomState for a permutation before splitting; torch-fidelity has 2020, ADM none.
    Raises:
      ValueError: fewer images than splits.
    Source: arXiv:1606.03498.
    """
    n = len(logits)
    logits = np.asarray(logits, np.float64)
    if shuffle is not None:
        logits = logits[np.random.RandomState(shuffle).permutation(n)]
    edges = [*range(0, n, size), n] if size else [i * n // splits for i in range(splits + 1)]
    if min(np.diff(edges), default=0) < 1:
        raise ValueError(f"the Inception Score has {splits} splits, but there are {n} images; give more")
    logits = logits - logits.max(1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    scores = []
    for first, last in itertools.pairwise(edges):
        p, log = np.exp(log_p[first:last]), log_p[first:last]
        scores.append(np.exp((p * (log - np.log(p.mean(0)))).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(
    a: np.ndarray, b: np.ndarray, subsets: int = 100, size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """Mean and standard deviation over subsets of the unbiased MMD^2 with the kernel (x.y / d + 1)^3.

    The subsets are those that torch-fidelity draws (numpy's RandomState).

    Args:
      a: features of samples [n d].
      b: features of the reference [m d].
    Raises:
      ValueError: fewer images than a subset has.
    Source: KID, arXiv:1801.01401.
    """
    if min(len(a), len(b)) < size or size < 2:
        raise ValueError(
            f"KID subsets have {size} images, but there are {len(a)} samples and {len(b)} references; give more images, "
            "or a smaller kid_size (at least 2)"
        )
    rng, found = np.random.RandomState(seed), []
    for _ in range(subsets):
        x = np.asarray(a[rng.choice(len(a), size, replace=False)], np.float64)
        y = np.asarray(b[rng.choice(len(b), size, replace=False)], np.float64)
        xx, yy, xy = ((u @ v.T / u.shape[1] + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
        within = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)
        found.append(within / (size * (size - 1)) - 2 * xy.mean())
    return float(np.mean(found)), float(np.std(found))


def manifold(samples: np.ndarray, reference: np.ndarray, k: int = 3, density_k: int = 5) -> dict[str, float]:
    """Precision, recall, density and coverage: who lies in whose balls of k-th-neighbour radius, borders included.

    Distances are float32, from features centred at the reference's mean; blocks, so memory is linear in the images.

    Args:
      samples: features [n d].
      reference: features [m d].
      k: neighbour of precision and recall.
      density_k: neighbour of density and coverage.
    Raises:
      ValueError: not more images than neighbours, in either set.
    Source: arXiv:1904.06991 (precision, recall), arXiv:2002.09797 (density, coverage).
    """
    most = max(k, density_k)
    if min(len(samples), len(reference)) <= most:
        raise ValueError(
            f"precision, recall, density and coverage need more than {most} images, got {len(samples)} samples and "
            f"{len(reference)} references"
        )
    centre = np.mean(reference, 0, dtype=np.float64)
    a, b = (np.asarray(x - centre, np.float32) for x in (samples, reference))
    radius_a, radius_b = _radii(a, (k,))[0], _radii(b, (k, density_k))
    precision, recall, inside, covered = [], np.zeros(len(b), bool), 0, np.zeros(len(b), bool)
    for first in range(0, len(a), BLOCK):
        block, radius = a[first : first + BLOCK], radius_a[first : first + BLOCK]
        hit = np.zeros(len(block), bool)
        for start in range(0, len(b), BLOCK):
            span = slice(start, start + BLOCK)
            distance = _distances(block, b[span])
            hit |= (distance <= radius_b[0][span]).any(1)
            recall[span] |= (distance <= radius[:, None]).any(0)
            balls = distance <= radius_b[1][span]
            inside += int(balls.sum())
            covered[span] |= balls.any(0)
        precision.append(hit)
    return {
        "precision": float(np.concatenate(precision).mean()), "recall": float(recall.mean()),
        "density": inside / (density_k * len(a)), "coverage": float(covered.mean()),
    }  # fmt: skip


def _radii(x, ks):
    """Squared distance of each vector to its k-th neighbour, for several k."""
    most, found = max(ks) + 1, []
    for first in range(0, len(x), BLOCK):
        block, nearest = x[first : first + BLOCK], np.empty((len(x[first : first + BLOCK]), 0), np.float32)
        for start in range(0, len(x), BLOCK):
            distance = _distances(block, x[start : start + BLOCK])
            if start == first:
                np.fill_diagonal(distance, 0)  # itself, also after rounding
            nearest = np.concatenate([nearest, distance], 1)
            if nearest.shape[1] > most:
                nearest = np.partition(nearest, most - 1, 1)[:, :most]
        found.append(np.sort(nearest, 1))
    found = np.concatenate(found)
    return [found[:, k] for k in ks]


def _distances(a, b):
    rows = [np.pad(x, ((0, -len(x) % (BLOCK // 8)), (0, 0))) for x in (a, b)]  # so that few programs are compiled
    return np.array(_squared(*rows))[: len(a), : len(b)]


@jax.jit
def _squared(a, b):
    dots = jnp.matmul(a, b.T, precision=lax.Precision.HIGHEST)
    return jnp.maximum((a * a).sum(1)[:, None] - 2 * dots + (b * b).sum(1), 0)


# Pairs of images -------------------------------------------------------------------------------------------


@typed
def psnr(a: Float[Array, "b h w c"], b: Float[Array, "b h w c"]) -> Float[Array, "b"]:
    """Peak signal-to-noise ratio of images in [0, 1], in decibels; infinite for equal ones."""
    return -10 * jnp.log10(jnp.square(a - b).mean((1, 2, 3)))


@typed
def ssim(a: Float[Array, "b h w c"], b: Float[Array, "b h w c"]) -> Float[Array, "b"]:
    """Structural similarity of images in [0, 1]: Gaussian window of 11 pixels, sigma 1.5, where it fits the image.

    Mean over positions and channels; K1 = 0.01, K2 = 0.03, population covariances (scikit-image: `gaussian_weights=True,
    sigma=1.5, use_sample_covariance=False, data_range=1`).

    Raises:
      ValueError: images smaller than the window.
    Source: Wang et al. 2004, doi:10.1109/TIP.2003.819861.
    """
    luminance, contrast = _similarity(a, b)
    return (luminance * contrast).mean((1, 2, 3))


MS_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
MS_SMALLEST = 10 * 2 ** (len(MS_WEIGHTS) - 1) + 1  # pixels


@typed
def ms_ssim(a: Float[Array, "b h w c"], b: Float[Array, "b h w c"]) -> Float[Array, "b"]:
    """Multi-scale structural similarity of images in [0, 1], five scales, halved by 2x2 means; negative terms count 0.

    The last scale has the luminance too. Each channel is pooled by itself, then averaged.

    Raises:
      ValueError: images smaller than 161 pixels.
    Source: Wang et al. 2003, doi:10.1109/ACSSC.2003.1292216.
    """
    if min(a.shape[1:3]) < MS_SMALLEST:
        raise ValueError(f"MS-SSIM needs images of at least {MS_SMALLEST} pixels a side, got {a.shape[1:3]}")
    result = jnp.ones((a.shape[0], a.shape[3]))
    for i, weight in enumerate(MS_WEIGHTS):
        if i:
            a, b = _halved(a), _halved(b)
        luminance, contrast = _similarity(a, b)
        part = (luminance * contrast if i == len(MS_WEIGHTS) - 1 else contrast).mean((1, 2))
        result *= jnp.maximum(part, 0) ** weight
    return result.mean(1)


def _halved(x):
    x = jnp.pad(x, ((0, 0), *((0, side % 2) for side in x.shape[1:3]), (0, 0)), "edge")
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def _similarity(a, b):
    """Luminance and contrast-structure terms at every position of the window."""
    if min(a.shape[1:3]) < 11:
        raise ValueError(f"SSIM needs images of at least 11 pixels a side, got {a.shape[1:3]}")
    mean_a, mean_b = _window(a), _window(b)
    var_a, var_b = _window(a * a) - mean_a**2, _window(b * b) - mean_b**2
    both = _window(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
    return luminance, (2 * both + 0.03**2) / (var_a + var_b + 0.03**2)


def _window(x):
    for axis in (1, 2):
        x = jnp.moveaxis(jnp.tensordot(_gauss(x.shape[axis]), x, (1, axis), precision=lax.Precision.HIGHEST), 0, axis)
    return x


@functools.lru_cache
def _gauss(n):
    """float32 [n-10 n], a window of 11 at every place."""
    window = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    matrix = np.zeros((n - 10, n), np.float32)
    for i in range(n - 10):
        matrix[i, i : i + 11] = window / window.sum()
    return matrix


# Tokens and texts ------------------------------------------------------------------------------------------


def code_use(counts: np.ndarray) -> dict[str, float]:
    """How a codebook is used.

    Args:
      counts: how often each code occurs, int [codes].
    Returns:
      "usage", the share of codes that occur, and "perplexity", exp of the entropy of their frequencies (1..codes).
    """
    total = counts.sum()
    p = counts[counts > 0] / max(total, 1)
    return {"usage": float((counts > 0).mean()), "perplexity": float(np.exp(-(p * np.log(p)).sum()))}


def bits_per_pixel(slots: int, codes: Sequence[int], size: tuple[int, int]) -> float:
    """Of a token array with `slots` tokens, each of sub-codes of these sizes, at a flat rate (no entropy coding)."""
    return slots * sum(math.log2(c) for c in codes) / math.prod(size)


def edit_distance(a: Sequence, b: Sequence) -> int:
    """Fewest insertions, deletions and substitutions that make one of the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]
