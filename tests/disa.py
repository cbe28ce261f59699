"""Agreement, network calls and time of a trained diffusion or flow model, by the rule of its inner steps (DiSA).

    python tests/disa.py RUN [--first 25 --last 5] [--count 500]

One line per rule: the model's own fixed number of inner steps, fewer but fixed, and the annealed ones, with the classifier
of agreement.py. Times are of the compiled sampler, decoder included, taken in turns in one process. Not a pytest file: it
needs a trained run.
"""

import argparse
import dataclasses
import time

import jax
import numpy as np
from agreement import flat, judge
from tqdm import tqdm

from ar_jax.heads.integrate import annealed
from ar_jax.machine.sharding import MeshShape, make_mesh
from ar_jax.options import Sampler
from ar_jax.sampler import condition_table, open_drawer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument(
        "--first", type=int, default=0, help="inner steps of the first decode step; 0 is the model's own"
    )
    parser.add_argument("--last", type=int, default=5, help="of the last decode step")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--data", default="mnist5k")
    arguments = parser.parse_args()
    classifier, _ = judge(arguments.data, check=False)
    plain = open_drawer(arguments.run, Sampler(batch=arguments.batch))
    owner = "generator" if hasattr(plain.generator, "anneal") else "generator.head"
    steps = (plain.generator if owner == "generator" else plain.generator.head).steps  # a text of diffusion heads
    own = int(steps)
    first, last = arguments.first or own, arguments.last
    rules = [("constant", own, own), ("constant", last, last)]
    rules[1:1] = [(rule, first, last) for rule in ("two_stage", "linear", "cosine")]
    mean = {round(annealed(*rule, 64).mean()) for rule in rules[1:4]}
    rules[4:4] = [("constant", count, count) for count in sorted(mean)]
    key = jax.random.split(jax.random.key(0), 1)
    decode_steps = len(plain.order(plain.generator.spec, key, 1, 0).sizes)
    mesh, classes, seconds, right, draws, calls = (
        make_mesh(MeshShape()), len(classifier.classes_), {}, {}, {}, {}
    )  # fmt: skip
    for rule in tqdm(rules, desc="compile"):
        values = {"anneal": rule[0], "steps": type(steps)(rule[1]), "last_steps": rule[2]}
        fields = tuple((f"{owner}.{name}", value) for name, value in values.items())
        sampling = dataclasses.replace(plain.sampling, fields=(*plain.sampling.fields, *fields))
        drawer = open_drawer(arguments.run, Sampler(batch=arguments.batch, sampling=sampling))
        calls[rule] = drawer.generator.calls(drawer.order(drawer.generator.spec, key, 1, 0))
        draws[rule], table = drawer.compile(mesh), condition_table(drawer.model.info, drawer.options)[1]
        _images(draws[rule], table, np.arange(arguments.batch))
    for start in tqdm(range(0, arguments.count, arguments.batch), desc="draw"):
        ids = np.arange(start, start + arguments.batch)
        for rule in rules:
            begin = time.perf_counter()
            images = _images(draws[rule], table, ids)
            seconds.setdefault(rule, []).append(time.perf_counter() - begin)
            right.setdefault(rule, []).append(classifier.predict(flat(images)) == ids % classes)
    print(f"{decode_steps} decode steps; times per {arguments.batch} images, median")
    print("| inner steps | network calls an image | agreement | time | relative |")
    print("|---|---|---|---|---|")
    for rule in rules:
        name = f"{rule[1]}, fixed" if rule[0] == "constant" else f"{rule[1]} to {rule[2]}, {rule[0]}"
        taken = np.median(seconds[rule])
        speed = taken / np.median(seconds[rules[0]])
        called = ", ".join(f"{count.sum()} of the {network}" for network, count in calls[rule].items())
        print(f"| {name} | {called} | {np.mean(right[rule]):.1%} | {taken:.2f} s | {speed:.2f} |")


def _images(draw, table, ids):
    batch = {name: x[ids % len(x)] for name, x in table.items()}
    rows = {one.row: one.image for one in draw(batch, ids)}
    return np.stack([rows[i] for i in range(len(ids))])


if __name__ == "__main__":
    main()
