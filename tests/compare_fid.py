"""FID, KID, Inception Score, precision and recall against torch-fidelity and pytorch-fid: random weights, real images.

    python tests/compare_fid.py [--count 1000] [--folder /tmp/compare]

Twice COUNT windows of real photographs, one half slightly blurred, go through InceptionV3 with the same random weights in
all three programs. Needs the extra `compare`. Not a pytest file: two CPU cores take about half an hour for 2,000 images.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from evals.weights import crops, random_inception
from skimage.filters import gaussian

from ar_jax.evaluate import Generation, Judge, evaluate_generation
from ar_jax.files.images import save_picture
from ar_jax.machine.compiled import keep_compiled


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/compare"))
    arguments = parser.parse_args()
    folder, count = arguments.folder, arguments.count
    keep_compiled()
    a, b = folder / "a", folder / "b"
    for path, seed in ((a, 1), (b, 2)):
        for i, image in enumerate(crops(count, 96, seed)):
            if path == a:
                image = np.rint(255 * gaussian(image / 255, 0.7, channel_axis=-1)).astype(np.uint8)
            save_picture(path / f"{i:04d}.png", image)
    weights = folder / "random.pth"
    torch.save({key: torch.tensor(value) for key, value in random_inception().items()}, weights)

    def ours(protocol, *metrics):
        options = Generation(
            samples=str(a), reference=str(b), out=str(folder / f"{protocol}.json"), metrics=metrics, report=False,
            judge=Judge(protocol=protocol, weights=str(weights)), kid_size=count // 2,
        )  # fmt: skip
        result = evaluate_generation(options)
        return {name.partition("-")[0]: value for name, value in result["figures"].items()}

    show("torch-fidelity", ours("torch-fidelity", "fd", "is", "kid", "pr"), torch_fidelity(a, b, weights, count // 2))
    show("pytorch-fid", ours("pytorch-fid", "fd"), pytorch_fid(a, b, weights))


def torch_fidelity(a, b, weights, kid_size):
    from torch_fidelity import calculate_metrics

    found = calculate_metrics(  # its precision and recall would be of VGG16
        input1=str(a), input2=str(b), feature_extractor="inception-v3-compat", cuda=False, isc=True, fid=True, kid=True, prc=True, kid_subset_size=kid_size,
        feature_extractor_weights_path=str(weights), verbose=False, cache=False, samples_find_deep=False, save_cpu_ram=True,
    )  # fmt: skip
    names = {
        "FD": "frechet_inception_distance", "KD": "kernel_inception_distance_mean", "IS": "inception_score_mean",
        "precision": "precision", "recall": "recall",
    }  # fmt: skip
    return {ours: found[theirs] for ours, theirs in names.items()}


def pytorch_fid(a, b, weights):
    from pytorch_fid import fid_score, inception

    inception.load_state_dict_from_url = lambda *_, **__: torch.load(weights)
    return {"FD": fid_score.calculate_fid_given_paths([str(a), str(b)], 50, "cpu", 2048, num_workers=0)}


def show(tool, ours, theirs):
    for name, value in theirs.items():
        apart = abs(ours[name] - value) / abs(value)
        print(
            f"{tool:<16}{name:<10} ours {ours[name]:.6g}  theirs {value:.6g}  relative difference {apart:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
