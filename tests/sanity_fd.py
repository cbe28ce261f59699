"""Does FD-EffLite0 behave? Real digits against real ones, against damaged ones, and against samples of a run.

    python tests/sanity_fd.py SAMPLES.npz [--count 1000] [--folder /tmp/sanity]

Prints a table (Markdown) of every set against the same COUNT real digits: other real digits, blur, noise and mixed-up
labels of growing strength, and the samples, which must have all classes in turn. Labels are seen by the distance within
classes only. Not a pytest file: it needs samples of a trained run.
"""

import argparse
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from ar_jax.compiled import keep_compiled
from ar_jax.data import Data
from ar_jax.evals.classifier import train_classifier
from ar_jax.evals.images import DataImages
from ar_jax.evaluate import Generation, Judge, evaluate_generation


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
    sets = {"real, the other half": (other, asked)}
    for sigma in (0.5, 1, 2):
        sets[f"blur {sigma} px"] = gaussian_filter(other, (0, sigma, sigma, 0)), asked
    for level in (8, 32, 96):
        noise = rng.normal(0, level, other.shape)
        sets[f"noise {level} of 255"] = np.clip(np.rint(other + noise), 0, 255).astype(np.uint8), asked
    for part in (0.25, 0.5, 1):
        sets[f"labels shuffled, {part:.0%}"] = shuffled(other, asked, part, rng)
    drawn = np.load(arguments.samples)["arr_0"][:count]
    sets["samples"] = np.broadcast_to(drawn, (*drawn.shape[:3], 3)), np.arange(len(drawn)) % digits.classes
    np.savez(folder / "real.npz", real, labels[:count])
    judge = train_classifier(Data())
    print(f"the classifier is right on {judge.accuracy:.1%} of held-out real digits\n")
    print("| set | FD-EffLite0 | within classes | KD-EffLite0 | precision | recall | label agreement |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for i, (name, (images, wanted)) in enumerate(sets.items()):
        np.savez(folder / f"{i}.npz", images, wanted)
        options = Generation(
            str(folder / f"{i}.npz"), str(folder / "real.npz"), out=str(folder / f"{i}.json"), report=False,
            judge=Judge(network="efficientnet-lite0"), metrics=("fd", "cfd", "kid", "pr"), kid_size=count // 2,
            cache=str(folder / "cache"),
        )  # fmt: skip
        found = evaluate_generation(options)["figures"]
        seen = (judge.predict(images) == wanted).mean()
        row = [found[f"{key}-EffLite0"] for key in ("FD", "class_FD", "KD", "precision", "recall")]
        print(
            f"| {name} | {row[0]:.2f} | {row[1]:.2f} | {row[2]:.2g} | {row[3]:.2f} | {row[4]:.2f} | {seen:.1%} |",
            flush=True,
        )


def shuffled(images, labels, part, rng):
    """Asks for the classes of other images, in this part of them."""
    labels, rows = labels.copy(), rng.permutation(len(labels))[: int(part * len(labels))]
    labels[rows] = labels[rng.permutation(rows)]
    return images, labels


if __name__ == "__main__":
    main()
