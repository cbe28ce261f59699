"""Does FD-EffLite0 behave? Real digits against real ones, against damaged ones, and against samples of a run.

    python tests/sanity_fd.py SAMPLES.npz [--count 1000] [--folder /tmp/sanity]

Prints a table (Markdown) of every set against the same COUNT real digits: other real digits, blur, noise and mixed-up
labels of growing strength, and the samples, which must have all classes in turn. Labels are seen by the distance within
classes only. Run it again to go on after an interruption. Not a pytest file: it needs samples of a trained run.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from ar_jax.data import Data
from ar_jax.evals.classifier import train_classifier
from ar_jax.evals.extract import Extractor
from ar_jax.evals.generation import Settings, extract, figures
from ar_jax.evals.images import DataImages, open_images
from ar_jax.evals.networks import PROTOCOLS, open_network
from ar_jax.machine.compiled import keep_compiled


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/sanity"))
    arguments = parser.parse_args()
    folder, count, rng = arguments.folder, arguments.count, np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    keep_compiled()
    digits = DataImages(Data(split="all"))
    order = rng.permutation(len(digits))
    pixels, labels = digits.read(range(len(digits)))[order], digits.labels[order]
    real, other, asked = pixels[:count], pixels[count : 2 * count], labels[count : 2 * count]
    drawn = np.load(arguments.samples)["arr_0"][:count]
    sets = {"real": (real, labels[:count]), "real, the other half": (other, asked)}
    sets["samples"] = np.broadcast_to(drawn, (*drawn.shape[:3], 3)), np.arange(len(drawn)) % digits.classes
    for sigma in (0.5, 1, 2):
        sets[f"blur {sigma} px"] = gaussian_filter(other, (0, sigma, sigma, 0)), asked
    for level in (8, 32, 96):
        noise = np.random.default_rng(level).normal(0, level, other.shape)
        sets[f"noise {level} of 255"] = np.clip(np.rint(other + noise), 0, 255).astype(np.uint8), asked

    protocol = PROTOCOLS["adm"]
    extractor = Extractor(open_network("efficientnet-lite0", protocol), 32)
    features = {}
    for i, (name, (images, wanted)) in enumerate(sets.items()):
        path = folder / f"{i}_{len(images)}.npz"
        if not path.exists():
            np.savez(path, images, wanted)
        features[name] = extract(open_images(str(path)), extractor, folder / path.stem, name, labels=True)
    judge = train_classifier(Data())
    seen = {name: judge.predict(images) for name, (images, _) in sets.items()}
    for part in (0.25, 0.5, 1):
        name = f"labels shuffled, {part:.0%}"
        features[name] = dataclasses.replace(features["real, the other half"], labels=shuffled(asked, part, rng))
        seen[name] = seen["real, the other half"]

    print(f"the classifier is right on {judge.accuracy:.1%} of held-out real digits\n")
    print("| set | FD-EffLite0 | within classes | KD-EffLite0 | precision | recall | label agreement |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    reference, settings = features.pop("real"), Settings(("fd", "cfd", "kid", "pr"), kid_size=count // 2)
    for name, one in features.items():
        found, _ = figures(one, reference, protocol, settings, extractor.network.suffix)
        row = [found[f"{key}-EffLite0"] for key in ("FD", "class_FD", "KD", "precision", "recall")]
        agree = (seen[name] == one.labels).mean()
        print(
            f"| {name} | {row[0]:.1f} | {row[1]:.1f} | {row[2]:.2g} | {row[3]:.2f} | {row[4]:.2f} | {agree:.1%} |",
            flush=True,
        )


def shuffled(labels, part, rng):
    """The labels of this part of the images change places."""
    labels, rows = labels.copy(), rng.permutation(len(labels))[: int(part * len(labels))]
    labels[rows] = labels[rng.permutation(rows)]
    return labels


if __name__ == "__main__":
    main()
