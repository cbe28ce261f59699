"""Do images show what their captions say? Figures and a picture of models that draw from words.

    python tests/captions.py RUN [RUN...] [--split test] [--count 0] [--picture captions.png] [--show 24]

Draws one image for every caption of a split of the run's data (or for COUNT, spread evenly), with seed 0, into
RUN/captions_SPLIT_COUNT.npz, and judges it by features of EfficientNet-Lite0 that real training images have taught to judge:

    retrieval    a ridge regression from features to the caption's vector (MiniLM's rows, averaged) gives every image a
                 vector; how often its caption's is the nearest, or among the 5 or 10 nearest, of all captions of the split,
                 and its median rank
    group        how often a linear classifier sees the class that the caption belongs to, a mean over the classes
    FD           Frechet distance to the real training images (FD-EffLite0)
    nearest      PSNR to the nearest training image, the median: copies are as near as the tokenizer lets them be

beside those of real images of the split, of what the tokenizers make of them, and of chance. Retrieval is counted for all
captions, and for those that are new: whose words before the first comma ("man astronaut, dark skin tone") no training caption
has before its own. The picture shows SHOW captions, spread evenly over the split, each with the real image and one of every
run. Not a pytest file: it needs trained runs.
"""

import argparse
import dataclasses
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from sklearn.linear_model import RidgeClassifier, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import ar_jax
from ar_jax.data import Data, open_source
from ar_jax.evals.extract import Extractor
from ar_jax.evals.images import DataImages
from ar_jax.evals.metrics import frechet_sets
from ar_jax.evals.networks import PROTOCOLS, open_network
from ar_jax.evaluate import RunImages
from ar_jax.files.models import open_model
from ar_jax.machine.compiled import keep_compiled
from ar_jax.options import Sampler
from ar_jax.text.encoder import open_encoder

AMONG = 1, 5, 10
ROWS = 32  # of a caption, for its vector


def caption_vectors(captions: list[str]) -> np.ndarray:
    """Unit vectors of captions, float32 [n 384]."""
    rows, mask = open_encoder("minilm").encode(captions, ROWS)
    return unit((rows * mask[..., None]).sum(1) / mask.sum(1, keepdims=True))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def ranks(vectors: np.ndarray, captions: np.ndarray) -> np.ndarray:
    """Rank of every image's own caption among all by angle, 1 the nearest.

    Args:
      vectors, captions: [n c], in the same order.
    Returns:
      int [n], 1..n.
    """
    near = unit(vectors - captions.mean(0)) @ unit(captions - captions.mean(0)).T
    return 1 + (near > np.diag(near)[:, None]).sum(1)


def nearest(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """PSNR in dB of every uint8 image to the nearest of others, [n]."""
    a, b = (x.reshape(len(x), -1).astype(np.float32) for x in (images, others))
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return 20 * np.log10(255) - 10 * np.log10(np.maximum(squared.min(1), 1) / a.shape[1])


def spread(n: int, count: int) -> np.ndarray:
    """`count` of n numbers, evenly; all of them if it is 0 or more than there are."""
    count = min(count or n, n)
    return np.arange(count) * n // count


def thing(caption: str) -> str:
    """What a caption names, without what it says of it."""
    return caption.split(",")[0]


def mean_recall(found: np.ndarray, labels: np.ndarray) -> float:
    """Share of the images whose class was found, a mean over the classes that there are."""
    return np.mean([(found[labels == label] == label).mean() for label in np.unique(labels)])


def drawn(run: str, captions: list[str], out: Path, labels: np.ndarray) -> np.ndarray:
    """One image for every caption, as `sample.py --captions` draws it; kept in a .npz that `ar_jax.evaluate` reads."""
    if not out.exists():
        images = RunImages(run, Sampler(captions=tuple(captions), batch=50), len(captions))
        np.savez_compressed(out, images.read(range(len(captions))), labels)
    return np.load(out)["arr_0"]


def picture(captions: list[str], columns: list[np.ndarray], side: int = 64, across: int = 4) -> Image.Image:
    """Images of every caption side by side, the caption below, in 256 colours.

    Args:
      columns: of each kind, uint8 images [n h w 3].
    """
    gap, font = 2, ImageFont.load_default(12)
    width, text = len(columns) * (side + gap) + 12, 32
    sheet = Image.new("RGB", (across * width, -(-len(captions) // across) * (side + text)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, caption in enumerate(captions):
        x, y = i % across * width + 6, i // across * (side + text) + 2
        for k, images in enumerate(columns):
            small = Image.fromarray(images[i]).resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(small, (x + k * (side + gap), y))
        lines = textwrap.wrap(caption, round(width / 6.2))[:2]
        pen.multiline_text((x, y + side), "\n".join(lines), "black", font, spacing=0)
    return sheet.quantize(256, dither=Image.Dither.FLOYDSTEINBERG)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--split", default="test")
    parser.add_argument("--count", type=int, default=0, help="captions, spread evenly over the split; 0 takes all")
    parser.add_argument("--picture", default="captions.png")
    parser.add_argument("--show", type=int, default=24, help="captions in the picture")
    arguments = parser.parse_args()
    keep_compiled()
    data = Data(**open_model(arguments.runs[0], "generator").settings["data"] | {"text": ""})
    real, labels, captions = {}, {}, {}
    for split in ("train", arguments.split):
        part = dataclasses.replace(data, split=split)
        images = DataImages(part)
        real[split], labels[split] = images.read(range(len(images))), images.labels
        captions[split] = list(open_source(part).captions())
    judged = spread(len(captions[arguments.split]), arguments.count)
    asked, group = [captions[arguments.split][i] for i in judged], labels[arguments.split][judged]
    extractor = Extractor(open_network("efficientnet-lite0", PROTOCOLS["adm"]), 32)
    taught = extractor(real["train"])["pool"]
    to_caption = make_pipeline(StandardScaler(), RidgeCV(np.logspace(2, 6, 9)))
    to_caption.fit(taught, caption_vectors(captions["train"]))
    to_group = make_pipeline(StandardScaler(), RidgeClassifier(1e3)).fit(taught, labels["train"])
    words = caption_vectors(asked)

    sets = {"real": real[arguments.split][judged]}
    for run in arguments.runs:
        model = ar_jax.load(run)
        sets[f"{run}, tokenizer only"] = model.decode(model.encode(sets["real"]))
        sets[run] = drawn(run, asked, Path(run) / f"captions_{arguments.split}_{len(asked)}.npz", group)
    new = ~np.isin([thing(x) for x in asked], [thing(x) for x in captions["train"]])
    print(
        f"{len(asked)} captions of {data.name} ({arguments.split}), {new.sum()} of them new, one image each; "
        f"{len(taught)} images taught the judges"
    )
    heads = [f"R@{k}" for k in AMONG] + ["median rank"]
    print("| images | " + " | ".join([*heads, *(f"new: {x}" for x in heads), "group", "FD", "nearest"]) + " |")
    print("| --- |" + " --- |" * (2 * len(heads) + 3))

    def retrieved(rank):
        return [f"{(rank <= k).mean():.1%}" for k in AMONG] + [f"{np.median(rank):g}"] if len(rank) else ["-"] * 4

    for name, images in sets.items():
        features = extractor(images)["pool"]
        rank = ranks(to_caption.predict(features), words)
        figures = [*retrieved(rank), *retrieved(rank[new]), f"{mean_recall(to_group.predict(features), group):.1%}"]
        figures += [f"{frechet_sets(features, taught):.1f}", f"{np.median(nearest(images, real['train'])):.1f} dB"]
        print(f"| {name} | " + " | ".join(figures) + " |")
    n = len(asked)
    chance = [f"{k / n:.1%}" for k in AMONG] + [f"{(n + 1) / 2:g}"]
    print("| chance | " + " | ".join([*chance, *chance, f"{1 / len(np.unique(group)):.1%}", "", ""]) + " |")
    chosen = spread(n, arguments.show)
    columns = [sets["real"][chosen], *(sets[run][chosen] for run in arguments.runs)]
    picture([asked[i] for i in chosen], columns).save(arguments.picture, optimize=True)


if __name__ == "__main__":
    main()
