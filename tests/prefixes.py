"""How often an independent classifier sees the class that was asked for when it is shown only the first tokens.

    python tests/prefixes.py RUN [--count 1000] [--pictures 16]

Images are drawn once, and shown after 1, 2, 4, ... steps of drawing (or after every step, where there are no more than
--pictures), as `sample.py RUN --preview` does: one program. Prints a table and writes RUN/prefixes.png. Not a pytest file: it
needs a trained run.
"""

import argparse
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from agreement import flat, judge

import ar_jax
from ar_jax import sample
from ar_jax.decode.glimpse import marks

GAP = 2  # white pixels between the pictures of a strip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--data", default="mnist5k")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--pictures", type=int, default=16)
    arguments = parser.parse_args()
    classifier, accuracy = judge(arguments.data)
    model = ar_jax.load(arguments.run)
    order = model.order(model.tokenizer.spec)
    steps = marks(len(order.sizes), arguments.pictures)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "steps.npz"
        sample.main(
            [arguments.run, "--preview", str(arguments.pictures), "--count", str(arguments.count), "--batch", "100", "--out", str(out)]
        )
        strips = np.load(out)["arr_0"]
    each = (strips.shape[2] + GAP) // len(steps)
    shown = [strips[:, :, i * each : (i + 1) * each - GAP] for i in range(len(steps))]
    asked, tokens = np.arange(arguments.count) % len(classifier.classes_), np.cumsum(order.sizes)
    agreed = [(classifier.predict(flat(images)) == asked).mean() for images in shown]
    print(f"classifier: {accuracy:.1%} right on held-out real images; {arguments.count} samples")
    print("steps  tokens  agreement")
    for step, found in zip(steps, agreed):
        print(f"{step:5}  {tokens[step - 1]:6}  {found:.1%}")
    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    axis.plot([tokens[step - 1] for step in steps], np.multiply(agreed, 100), "o-")
    axis.set(xlabel="tokens shown", ylabel="agreement (%)", ylim=(0, 101), title=model.tokenizer.__class__.__name__)
    axis.grid(alpha=0.3)
    figure.savefig(Path(arguments.run) / "prefixes.png", dpi=130)


if __name__ == "__main__":
    main()
