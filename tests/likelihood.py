"""Bits a dimension of held-out images under a trained generator of pixels, beside two models that know less.

    python tests/likelihood.py RUN [--data mnist5k] [--draws 4]

One line each: all values alike (8 bits); pixels independent of each other, each place with the histogram of the training images
and the pseudo-counts that serve the held-out images best; the run, with and without the images' classes. Of masked generators it
is an upper bound, the mean over random orders. Not a pytest file: it needs a trained run.
"""

import argparse

import numpy as np

import ar_jax
from ar_jax.data import Data, batches, open_source
from ar_jax.evals.likelihood import bits_per_dimension, independent_bits


def images_of(name: str, split: str, size: int, limit: int):
    data = Data(name=name, split=split, size=size)
    source = open_source(data)
    found = next(iter(batches(source, data, batch=min(len(source), limit), seed=0, train=False)))
    return np.asarray(found["image"]), np.asarray(found["label"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--data", default="mnist5k")
    parser.add_argument("--draws", type=int, default=4, help="of masks, for every image")
    parser.add_argument("--limit", type=int, default=10000, help="images, at most")
    arguments = parser.parse_args()
    model = ar_jax.load(arguments.run)
    (train, _), (images, labels) = (
        images_of(arguments.data, split, model.tokenizer.size[0], arguments.limit) for split in ("train", "test")
    )
    if model.tokenizer.channels == 1:
        train, images = (np.round(x.mean(-1, keepdims=True)).astype(np.uint8) for x in (train, images))
    print(f"{len(images)} held-out images of {arguments.data}, bits a dimension:")
    print("uniform values: 8.000")
    best = min((independent_bits(train, images, pseudo) for pseudo in (1, 1 / 16, 1 / 256, 1 / 4096)), key=np.mean)
    print(f"independent pixels: {said(best)}")
    shown = images if images.shape[-1] == 3 else images.repeat(3, axis=-1)
    for name, given in (("with", labels), ("without", None)):
        bits = bits_per_dimension(model, shown, given, draws=arguments.draws)
        print(f"{arguments.run}, {name} classes: {said(bits)}", flush=True)


def said(bits):
    return f"{bits.mean():.3f} +- {bits.std() / len(bits) ** 0.5:.3f}"


if __name__ == "__main__":
    main()
