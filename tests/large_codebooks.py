"""Memory, and with --time also time, of one training update with 2^18 codes beside 2^10 at the same network.

    python tests/large_codebooks.py [--time 3]

The networks are those of the digits (32x32 images, 64 of them, 4,096 latents). Memory is what the compiled update needs (XLA's
own account: arguments, results and temporary arrays), and beside it what the parameters with their gradients and moments take.
Times are medians of updates in turns. Not a pytest file: with --time it takes minutes.
"""

import argparse
import math
import statistics
import time

import jax
import numpy as np

from ar_jax.config import TokenizerStage, load_config
from ar_jax.convert.sources import param_shapes
from ar_jax.tokenizers.quantize import VectorLoss
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.train.tokenizer import tokenizer_recipe

IBQ = load_config("ibq:mnist5k").tokenizer.module
LFQ = load_config("open_magvit2:mnist5k").tokenizer.module
BITS = {10: (4, 6), 18: (6, 12)}
METHODS = {
    "LFQ": lambda bits: LFQ.clone(bits=BITS[bits]),
    "IBQ": lambda bits: IBQ.clone(codes=2**bits),
    "VQ": lambda bits: VQGAN(
        size=IBQ.size, features=IBQ.features, mult=IBQ.mult, res_blocks=IBQ.res_blocks, latent=IBQ.latent, codes=2**bits,
        code_features=IBQ.code_features, groups=IBQ.groups, vq=VectorLoss(entropy=0.02),
    ),
}  # fmt: skip


def compiled(module):
    """A recipe, its compiled update, a state, and what the update needs in bytes."""
    stage = load_config("open_magvit2:mnist5k").tokenizer
    recipe = tokenizer_recipe(TokenizerStage(module=module, losses=stage.losses, optim=stage.optim, steps=250), module)
    batch = {"image": np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)}
    state = jax.eval_shape(recipe.init, jax.random.key(0))
    update = jax.jit(recipe.update, donate_argnums=0).lower(state, {}, batch, jax.random.key(1)).compile()
    need = update.memory_analysis()
    held = need.argument_size_in_bytes + need.output_size_in_bytes + need.temp_size_in_bytes - need.alias_size_in_bytes
    return recipe, update, batch, held


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", type=int, default=0, help="timed updates of each")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    print("method  codes  MiB an update  of them parameters, gradients, moments  seconds")
    for name in arguments.methods:
        of = METHODS[name]
        runs = {bits: compiled(of(bits)) for bits in (10, 18)}
        seconds = {bits: [] for bits in runs}
        states = {bits: jax.jit(run[0].init)(jax.random.key(0)) for bits, run in runs.items()} if arguments.time else {}
        for _ in range(arguments.time + 1 if arguments.time else 0):
            for bits, (_, update, batch, _) in runs.items():
                start = time.perf_counter()
                states[bits], _ = jax.block_until_ready(update(states[bits], {}, batch, jax.random.key(1)))
                seconds[bits].append(time.perf_counter() - start)
        for bits, (*_, held) in runs.items():
            params = 16 * sum(math.prod(x.shape) for x in jax.tree.leaves(param_shapes(of(bits))))
            took = f"{statistics.median(seconds[bits][1:]):.2f}" if arguments.time else "-"
            print(f"{name:6}  2^{bits:<4} {held / 2**20:13.1f}  {params / 2**20:38.1f}  {took:>7}", flush=True)
        ratio = runs[18][-1] / runs[10][-1]
        slow, fast = (statistics.median(seconds[bits][1:] or [math.nan]) for bits in (18, 10))
        print(f"{name:6}  2^18 beside 2^10: memory {ratio:.2f}, time {slow / fast:.2f}", flush=True)


if __name__ == "__main__":
    main()
