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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples")
    parser.add_argument("--data", default="mnist5k")
    parser.add_argument("--limit", type=int, default=10000, help="real images used, at most")
    arguments = parser.parse_args()
    data = Data(name=arguments.data, split="all", size=32)
    source = open_source(data)
    real = next(iter(batches(source, data, batch=min(len(source), arguments.limit), seed=0, train=False)))
    pixels = real["image"].mean(-1).reshape(len(real["image"]), -1) / 255
    classifier = make_pipeline(StandardScaler(with_std=False), SVC(C=10))
    accuracy = cross_val_score(classifier, pixels, real["label"], cv=5).mean()
    classifier.fit(pixels, real["label"])
    images = np.load(arguments.samples)["arr_0"].mean(-1).reshape(-1, pixels.shape[1]) / 255
    asked = np.arange(len(images)) % source.info.classes
    seen = classifier.predict(images)
    print(f"classifier: {accuracy:.1%} right on held-out real images (5-fold, {len(pixels)} images)")
    print(f"agreement: {(seen == asked).mean():.1%} of {len(images)} samples; per class:")
    print("  ".join(f"{c}: {(seen[asked == c] == c).mean():.0%}" for c in range(source.info.classes)))


if __name__ == "__main__":
    main()
