"""How often an independent classifier sees the class that was asked for.

    python tests/agreement.py SAMPLES.npz [--data mnist5k]

A scikit-learn support vector machine is trained on all real images of the data set; its own accuracy is cross-validated.
SAMPLES.npz must come from sample.py with all classes in turn (the default), so image i shows class i modulo classes.
Not a pytest file: it needs a trained run.
"""

import argparse

import numpy as np
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from ar_jax.data import Data, batches, open_source


def judge(name: str = "mnist5k", limit: int = 10000, check: bool = True):
    """A classifier of flat images in [0, 1] trained on real images of a data set, and its accuracy on held-out ones.

    Args:
      limit: real images used, at most.
      check: measure the accuracy (else it is nan).
    """
    data = Data(name=name, split="all", size=32)
    source = open_source(data)
    real = next(iter(batches(source, data, batch=min(len(source), limit), seed=0, train=False)))
    pixels = flat(real["image"])
    classifier = make_pipeline(StandardScaler(with_std=False), SVC(C=10))
    accuracy = cross_val_score(classifier, pixels, real["label"], cv=5).mean() if check else np.nan
    return classifier.fit(pixels, real["label"]), accuracy


def flat(images):
    return images.mean(-1).reshape(len(images), -1) / 255


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples")
    parser.add_argument("--data", default="mnist5k")
    parser.add_argument("--limit", type=int, default=10000, help="real images used, at most")
    arguments = parser.parse_args()
    classifier, accuracy = judge(arguments.data, arguments.limit)
    images, classes = np.load(arguments.samples)["arr_0"], len(classifier.classes_)
    asked = np.arange(len(images)) % classes
    seen = classifier.predict(flat(images))
    print(f"classifier: {accuracy:.1%} right on held-out real images (5-fold)")
    print(f"agreement: {(seen == asked).mean():.1%} of {len(images)} samples; per class:")
    print("  ".join(f"{c}: {(seen[asked == c] == c).mean():.0%}" for c in range(classes)))


if __name__ == "__main__":
    main()
