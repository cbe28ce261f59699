"""Trained runs beside each other: agreement, network calls an image, and time of sampling, measured in turn.

    python tests/methods.py RUN[@NAME=VALUE[,NAME=VALUE]] ... [--count 1000] [--batch 100]

What follows @ changes how a run is drawn from, by the short names of sample.py (RUN@steps=8). Batches of all runs are drawn in
turn, so that what else the machine does is shared; the first one of each, which compiles, is not timed. Times are medians of a
batch, by those of the first run. Not a pytest file: it needs trained runs.
"""

import argparse
import ast
import time

import jax
import numpy as np
from agreement import flat, judge

import ar_jax
from ar_jax.files.images import to_uint8
from ar_jax.options import Sampler
from ar_jax.sampler import condition_table, image_keys


def opened(text: str):
    """A drawing function of (numbers of images) and the run's settings, of RUN@NAME=VALUE."""
    run, _, changes = text.partition("@")
    model = ar_jax.load(run)
    pairs = (change.split("=") for change in changes.split(",") if change)
    sampling = model.changed(**{name: ast.literal_eval(value) for name, value in pairs})
    _, table = condition_table(model.info, Sampler(), ())
    draw = jax.jit(model.sampler(sampling))

    def images(ids):
        batch = {key: rows[ids % len(rows)] for key, rows in table.items()}
        return jax.block_until_ready(draw(model.params, batch, *image_keys(0, ids)))

    return images


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--data", default="mnist5k")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=100)
    arguments = parser.parse_args()
    classifier, _ = judge(arguments.data, check=False)
    ways = {run: opened(run) for run in arguments.runs}
    pictures, calls, seconds = ({run: [] for run in ways} for _ in range(3))
    for draw in ways.values():
        draw(np.arange(arguments.batch, dtype=np.uint32))
    for first in range(0, arguments.count, arguments.batch):
        ids = np.arange(first, first + arguments.batch, dtype=np.uint32)
        for run, draw in ways.items():
            begun = time.perf_counter()
            drawn, account = draw(ids)
            seconds[run].append(time.perf_counter() - begun)
            pictures[run].append(np.asarray(to_uint8(drawn)))
            calls[run].append({name: float(np.mean(many)) for name, many in account.calls.items()})
    once = np.median(seconds[arguments.runs[0]])
    print(f"A batch of {arguments.batch} images of {arguments.runs[0]} takes {once:.2f} s (median of {len(seconds[arguments.runs[0]])}).")
    print("| run | agreement | calls an image | time |")
    print("| --- | --- | --- | --- |")
    for run in ways:
        asked = np.arange(arguments.count) % len(classifier.classes_)
        agreed = (classifier.predict(flat(np.concatenate(pictures[run]))) == asked).mean()
        said = ", ".join(f"{np.mean([call[name] for call in calls[run]]):.4g} {name}" for name in calls[run][0])
        print(f"| {run} | {agreed:.1%} | {said} | {np.median(seconds[run]) / once:.2f} |")


if __name__ == "__main__":
    main()
