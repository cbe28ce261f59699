"""How good the features of a network are that draws no images: a linear probe.

    python tests/probe.py RUN [--data mnist5k]

A logistic regression learns the classes of the training images from the features of the frozen network (its class's row and the mean
of its patches), and is asked for those of held-out images; beside it the same from the features of a network that was not trained,
and from plain pixels. For SemAIM (`generators.semaim`). Not a pytest file: it needs a trained run.
"""

import argparse

import jax
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import ar_jax
from ar_jax.data import Data, batches, open_source


def images_of(data):
    source = open_source(data)
    every = next(iter(batches(source, data, batch=min(len(source), 10000), seed=0, train=False)))
    return every["image"], every["label"]


def probe(known, labels, asked, truth):
    """The part of the asked that a linear classifier gets right."""
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=500, C=0.1)).fit(known, labels).score(asked, truth)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--data", default="mnist5k")
    arguments = parser.parse_args()
    model = ar_jax.load(arguments.run)
    size = model.tokenizer.size[0]
    (known, labels), (asked, truth) = (images_of(Data(arguments.data, split=split, size=size)) for split in ("train", "test"))

    @jax.jit
    def rows(params, tokens):
        found, _ = model.generator.apply({"params": params}, tokens, method="features")
        return jax.numpy.concatenate([found[:, 0], found[:, 1:].mean(1)], axis=-1)

    def features(params, images):
        parts = np.array_split(images, max(len(images) // 500, 1))
        return np.concatenate([rows(params, model.encode(part)) for part in parts])

    untrained = jax.jit(model.generator.init_params)(jax.random.key(0))  # outside of jit every operation is compiled
    for name, of in (
        ("features", lambda images: features(model.params["generator"], images)),
        ("features of an untrained network", lambda images: features(untrained, images)),
        ("pixels", lambda images: images.mean(-1).reshape(len(images), -1) / 255),
    ):
        print(f"{name}: {probe(of(known), labels, of(asked), truth):.1%} of {len(asked)} held-out images, {len(known)} known", flush=True)


if __name__ == "__main__":
    main()
