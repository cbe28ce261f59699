"""A network of a few numbers, so that whole evaluations run in seconds.

    python tests/evals/tiny.py SAMPLES REFERENCE OUT [--options of generation]

runs `evaluate generation` with it. DIE_AFTER=n ends the process without a word before chunk n.
"""

import os
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import tyro

from ar_jax.evals import extract
from ar_jax.evals.networks import Network
from ar_jax.machine import distributed


class Tiny(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), 2)(x))
        pool = x.mean((1, 2))
        return {"pool": pool, "spatial": x[:, ::4, ::4, :2].reshape(len(x), -1), "logits": nn.Dense(5)(pool) * 5}


def tiny_network() -> Network:
    params = jax.jit(Tiny().init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    return Network("tiny", "-Tiny", Tiny(), params, 16, "pil_bicubic", 128.0, 128.0, "0" * 64)


def main():
    from ar_jax.evaluate import Generation, evaluate_generation

    extract.CHUNK = 8
    samples, reference, out, *rest = sys.argv[1:]
    arguments = [samples, "--reference", reference, "--out", out, "--no-report", "--kid-size", "20", *rest]
    options = tyro.cli(Generation, args=arguments)
    with distributed.command("tiny"):
        distributed.join(options.launch)
        done = 0

        class Dying(extract.Extractor):
            def __call__(self, images):
                nonlocal done
                if done == int(os.environ.get("DIE_AFTER", "-1")):
                    os._exit(9)
                done += 1
                return super().__call__(images)

        import ar_jax.evaluate

        ar_jax.evaluate.Extractor = Dying
        evaluate_generation(options, tiny_network())


if __name__ == "__main__":
    main()
