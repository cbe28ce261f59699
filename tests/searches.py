"""Search against one draw: what a judge and an independent classifier say of images, at equal numbers of network calls.

    python -m ar_jax.decode.judges --out checkpoints/judge_mnist5k.safetensors --data.name mnist5k --data.size 32
    python tests/searches.py RUN [RUN ...] --judge checkpoints/judge_mnist5k.safetensors [--count 1000]

For every run: one draw; the best of 8; a beam of 4 with 2 candidates each; and lookahead, as wide as equal calls allow. Search
is won by whoever flatters its judge, so the agreement is that of another classifier (`tests/agreement.py`). Spread is the mean
distance of two images of one class, in grey levels of a pixel (root of the mean square). Not a pytest file: it needs trained runs.
"""

import argparse
import dataclasses
import time

import jax
import numpy as np
from agreement import flat, judge

import ar_jax
from ar_jax.decode.judges import ByClass, SmallNetwork
from ar_jax.decode.search import BestOf, Search
from ar_jax.decode.sequential import Sequential
from ar_jax.files.images import to_float, to_uint8
from ar_jax.options import Sampler
from ar_jax.sampler import condition_table, image_keys


def ways(judged: ByClass, steps: int) -> dict:
    """Decoders by name, with about 8 network calls for every call of one draw.

    Lookahead draws a candidate's steps and then as many more to the next stop, so half the candidates cost as much.
    """
    half = max(steps // 4, 1)
    return {
        "one draw": Sequential(),
        "best of 8": BestOf(8, judged),
        "beam 4 x 2, after 1, 2, 4, ...": Search(judged, 4, 2, spread=True),
        f"beam 4 x 2, every {half}": Search(judged, 4, 2, every=half, spread=True),
        f"lookahead {half}, 2 x 2, every {half}": Search(judged, 2, 2, every=half, ahead=half, spread=True),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--judge", required=True)
    parser.add_argument("--data", default="mnist5k")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=100)
    arguments = parser.parse_args()
    classifier, _ = judge(arguments.data, check=False)
    judged = ByClass(SmallNetwork(arguments.judge))
    weights = judged.open()
    score = jax.jit(lambda images, label: judged(weights, images[:, None], {"label": label})[:, 0])
    print("| run | decoder | agreement | judge, nats | spread | calls an image | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for run in arguments.runs:
        model = ar_jax.load(run)
        _, table = condition_table(model.info, Sampler(), ())
        for name, decoder in ways(judged, len(model.order(model.tokenizer.spec).sizes)).items():
            sampling = dataclasses.replace(model.sampling, decoder=decoder)
            draw = jax.jit(model.sampler(sampling))
            params = model.params if name == "one draw" else {**model.params, "decoder": weights}
            images, calls, seconds = [], {}, []
            for first in range(0, arguments.count, arguments.batch):
                ids = np.arange(first, first + arguments.batch, dtype=np.uint32)
                batch = {key: rows[ids % len(rows)] for key, rows in table.items()}
                begun = time.perf_counter()
                drawn, account = jax.block_until_ready(draw(params, batch, *image_keys(0, ids)))
                seconds.append(time.perf_counter() - begun)
                images.append(np.asarray(to_uint8(drawn)))
                calls = {key: calls.get(key, 0) + float(np.mean(many)) for key, many in account.calls.items()}
            images, asked = np.concatenate(images), np.arange(arguments.count) % len(classifier.classes_)
            agreed = (classifier.predict(flat(images)) == asked).mean()
            liked = float(score(to_float(images), asked).mean())
            ways_apart = [images[asked == one].astype(float) for one in classifier.classes_]
            spread = np.mean([np.sqrt(np.square(x[: len(x) // 2] - x[-(len(x) // 2) :]).mean((1, 2, 3))).mean() for x in ways_apart])
            batches = arguments.count // arguments.batch
            said = ", ".join(f"{many / batches:.4g} {key}" for key, many in calls.items())
            print(f"| {run} | {name} | {agreed:.1%} | {liked:.3f} | {spread:.1f} | {said} | {np.median(seconds):.1f} a batch |", flush=True)


if __name__ == "__main__":
    main()
