"""From sets of images to the figures of generation, with everything they depend on."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ar_jax.evals import metrics
from ar_jax.evals.extract import Ahead, Extractor, in_chunks, joined_hash, pixels_hash, read_chunks
from ar_jax.evals.images import Images, Statistics
from ar_jax.evals.networks import Protocol

METRICS = ("fd", "sfd", "is", "pr", "kid", "cfd")
SHOWN = 64  # images kept for the report


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is computed from the features, beside the protocol.

    Attributes:
      metrics: fd, sfd, is, pr (precision, recall, density, coverage), kid, cfd (distance within classes).
      kid_subsets, kid_size: of KID.
      density_neighbour: of density and coverage.
    """

    metrics: tuple[str, ...] = METRICS[:-1]
    kid_subsets: int = 100
    kid_size: int = 1000
    density_neighbour: int = 5

    def __post_init__(self):
        unknown = sorted(set(self.metrics) - set(METRICS))
        if unknown or not self.metrics:
            raise ValueError(f"metrics are {self.metrics}; choose among {', '.join(METRICS)}")

    def check(self, samples: int, reference: int, protocol: Protocol) -> None:
        """Refuses counts that are too small, before hours are spent on features.

        Args:
          samples: number of them.
          reference: number of reference images; 0 without any.
        Raises:
          ValueError: the metric and the numbers are named.
        """
        least = {"fd": 2, "sfd": 2, "is": protocol.splits or 1}
        if reference:
            least |= {"pr": max(protocol.neighbour, self.density_neighbour) + 1, "kid": self.kid_size}
        for name in self.metrics:
            few = samples if name == "is" or not reference else min(samples, reference)
            if few < least.get(name, 0):
                raise ValueError(
                    f"metric {name} needs at least {least[name]} images a side, got {samples} samples"
                    + (f" and {reference} references" if reference else "")
                    + ("; give --kid-size" if name == "kid" else "")
                    + f"; or leave it out: --metrics {' '.join(other for other in self.metrics if other != name)}"
                )


@dataclasses.dataclass(frozen=True)
class Features:
    """What figures need of a set of images.

    Attributes:
      count: of the images; 0 if only statistics are known.
      pool, logits: float32 [n d], or None.
      moments, spatial: mean and covariance of the pooled and of the spatial features, or None.
      sha256: of the pixels, or of the statistics.
      labels: int [n], or None.
      predicted: labels by a classifier, or None.
      shown: uint8 images for the report, or None.
    """

    count: int
    pool: np.ndarray | None
    logits: np.ndarray | None
    moments: metrics.Gaussian | None
    spatial: metrics.Gaussian | None
    sha256: str
    labels: np.ndarray | None = None
    predicted: np.ndarray | None = None
    shown: np.ndarray | None = None


def extract(
    images: Images,
    extractor: Extractor,
    folder: Path,
    name: str,
    predict: Callable[[np.ndarray], np.ndarray] | None = None,
    count: int = 0,
    labels: bool = False,
) -> Features:
    """Features of the first `count` images (0: all), through files in `folder`; with their labels if asked for."""
    count = count or len(images)
    chosen = np.isin(np.arange(count), np.random.default_rng(0).permutation(count)[:SHOWN])

    source = images if images.facts["format"] == "run" else Ahead(images, count)  # drawing needs the devices

    def compute(rows):
        pixels = source.read(rows)
        found = extractor(pixels) | {"sha256": pixels_hash(pixels)}
        found["shown"] = pixels[chosen[rows.start : rows.stop]]
        return found | ({"predicted": predict(pixels)} if predict else {})

    identity = {
        "images": images.where,
        "stamp": images.stamp, "facts": images.facts, "network": extractor.network.facts(), "classifier": bool(predict)
    }  # fmt: skip
    found = gather(read_chunks(in_chunks(folder, identity, count, compute, name)))
    return dataclasses.replace(found, labels=images.labels[:count]) if labels else found


def gather(chunks, prefix: str = "") -> Features:
    """One `Features` of chunks whose arrays are named `prefix` + "pool" and so on."""
    parts, moments = {name: [] for name in ("pool", "logits", "sha256", "predicted", "shown")}, {}
    for chunk in chunks:
        for name in ("pool", "spatial"):
            new = metrics.Moments.of(chunk[prefix + name])
            moments[name] = moments[name] + new if name in moments else new
        for name, found in parts.items():
            if prefix + name in chunk:
                found.append(chunk[prefix + name])
    joined = {name: np.concatenate(found) if found else None for name, found in parts.items() if name != "sha256"}
    pool, spatial = (m.gaussian() if m.count > 1 else None for m in (moments["pool"], moments["spatial"]))
    return Features(
        moments["pool"].count, joined["pool"], joined["logits"], pool, spatial, joined_hash(parts["sha256"]),
        None, joined["predicted"], None if joined["shown"] is None else joined["shown"][:SHOWN],
    )  # fmt: skip


def of_statistics(statistics: Statistics, images: Features | None = None) -> Features:
    """A reference of published statistics; the images beside them, if any, serve what needs single images."""
    spatial = None
    if statistics.spatial_mean is not None and statistics.spatial_cov is not None:
        spatial = metrics.Gaussian(statistics.spatial_mean, statistics.spatial_cov)
    moments = metrics.Gaussian(statistics.mean, statistics.cov)
    if images is None:
        return Features(0, None, None, moments, spatial, statistics.sha256)
    return dataclasses.replace(images, moments=moments, spatial=spatial, sha256=f"{statistics.sha256}+{images.sha256}")


def figures(
    samples: Features, reference: Features, protocol: Protocol, settings: Settings, suffix: str
) -> tuple[dict[str, float | None], list[str]]:
    """The figures by name, and remarks on them.

    A figure that the reference does not allow is None, with a remark. Names have no suffix only for the network of the
    FID: "FID", "FID-EffLite0" never is; that is "FD-EffLite0".
    """
    official = not suffix
    titles = {
        "fd": "FID" if official else "FD",
        "sfd": "sFID" if official else "sFD",
        "kid": "KID" if official else "KD",
    }
    found, remarks = {}, []

    def put(name, value):
        found[name + suffix] = value

    if "fd" in settings.metrics:
        _same_width(samples.moments, reference.moments, "mu")
        put(titles["fd"], metrics.frechet(samples.moments, reference.moments))
        few = [n for n in (samples.count, reference.count) if 0 < n < len(samples.moments.mean)]
        if few:
            remarks.append(
                f"{titles['fd']} of {min(few)} images with {len(samples.moments.mean)} features: covariances are "
                "rank-deficient and the bias is large; compare with equal counts only"
            )
    if "sfd" in settings.metrics:
        if reference.spatial is None:
            put(titles["sfd"], None)
            remarks.append(f"no {titles['sfd']}: the reference has no statistics mu_s, sigma_s of spatial features")
        else:
            _same_width(samples.spatial, reference.spatial, "mu_s")
            put(titles["sfd"], metrics.frechet(samples.spatial, reference.spatial))
    if "cfd" in settings.metrics:
        name = f"class_{titles['fd']}"
        put(name, None)
        if samples.labels is None or reference.labels is None:
            remarks.append(f"no {name}: samples or references have no labels")
        else:
            put(name, within_classes(samples, reference))
    if "is" in settings.metrics:
        mean, deviation = metrics.inception_score(
            samples.logits, protocol.splits, protocol.split_size, protocol.shuffle
        )
        put("IS", mean)
        put("IS_std", deviation)
    alone = reference.pool is None
    if "kid" in settings.metrics:
        pair = (None, None)
        if not alone:
            pair = metrics.kernel_distance(samples.pool, reference.pool, settings.kid_subsets, settings.kid_size)
        put(titles["kid"], pair[0])
        put(titles["kid"] + "_std", pair[1])
    if "pr" in settings.metrics:
        names = ("precision", "recall", "density", "coverage")
        values = dict.fromkeys(names)
        if not alone:
            values = metrics.manifold(samples.pool, reference.pool, protocol.neighbour, settings.density_neighbour)
        for name in names:
            put(name, values[name])
        if not alone and samples.count != reference.count:
            remarks.append(
                f"precision and recall compare {samples.count} samples with {reference.count} references, as they are"
            )
    if alone and {"kid", "pr"} & set(settings.metrics):
        remarks.append("no KID, precision, recall, density, coverage: the reference has statistics but no images")
    return found, remarks


def within_classes(samples: Features, reference: Features) -> float:
    """Mean over the classes of the Frechet distance between samples and references of a class (intra-FID).

    Raises:
      ValueError: classes of which one side has fewer than two images.
    Source: arXiv:1802.05637.
    """
    classes = np.union1d(samples.labels, reference.labels)
    found = []
    for label in classes:
        a, b = (x.pool[x.labels == label] for x in (samples, reference))
        if min(len(a), len(b)) < 2:
            raise ValueError(
                f"metric cfd needs at least 2 images of every class a side; of class {label} there are {len(a)} samples and "
                f"{len(b)} references"
            )
        found.append(metrics.frechet_sets(a, b))
    return float(np.mean(found))


def _same_width(ours, theirs, name):
    if ours is None:
        raise ValueError("a Frechet distance needs at least 2 samples")
    if ours.mean.shape != theirs.mean.shape:
        raise ValueError(
            f"the reference's {name} has {len(theirs.mean)} numbers, but the network gives {len(ours.mean)}; these statistics "
            "were made by another network or layer"
        )


def agreement(asked: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> tuple[float, list[dict[str, Any]]]:
    """How often a classifier sees the class asked for, over all and by class."""
    table = []
    for label in np.unique(asked):
        rows = asked == label
        wrong = predicted[rows & (predicted != label)]
        most = int(np.bincount(wrong).argmax()) if len(wrong) else None
        table.append(
            {
                "class": names[label] if label < len(names) else str(label), "images": int(rows.sum()),
                "agreement": float((predicted[rows] == label).mean()),
                "most_often_taken_for": None if most is None else names[most] if most < len(names) else str(most),
            }
        )  # fmt: skip
    return float((asked == predicted).mean()), table
