"""Speed of a config beside what the machine can do.

    python -m ar_jax.bench sample CONFIG [--batch 1]
    python -m ar_jax.bench train CONFIG [--batch 4]

    python -m ar_jax.bench sample configs/llamagen_b_256.py
    python -m ar_jax.bench train configs/llamagen_b_256.py
    python -m ar_jax.bench sample configs/mar_b_256.py --steps 64
    python -m ar_jax.bench sample configs/var_d30.py --repeat 0           how long compilation takes

Weights are random, so no checkpoint is needed. The machine's limits are measured in turns with the run itself: the fastest
of several matrix products, and the fastest reading of an array as large as the weights. Times and limits are the best of
the repetitions; a share compares a run with the limit measured beside it, and is the median over the repetitions, since
a shared machine changes from moment to moment. Compilation is reported apart.
"""

import dataclasses
import functools
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import traverse_util

from ar_jax.config import Experiment, load_config
from ar_jax.decode.sequential import sample
from ar_jax.decode.settings import arrange, make_knobs
from ar_jax.files.images import to_uint8
from ar_jax.files.models import untrained
from ar_jax.files.trust import taken
from ar_jax.machine.flops import model_flops, with_fields, without_remat
from ar_jax.machine.huge_pages import use_huge_pages
from ar_jax.orders import in_steps
from ar_jax.train.optim import make_optimiser
from ar_jax.train.recipes import generator_loss, gradients
from ar_jax.train.state import create, make_update
from ar_jax.typing import Batch, Params

HOST = re.compile(r"\b(?:infeed|outfeed|send|recv)\(|callback")  # in a compiled program


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    what: Annotated[Literal["sample", "train"], tyro.conf.Positional]
    """Sampling images, or the training step of the generator."""
    config: Annotated[str, tyro.conf.Positional]
    """Config file."""
    batch: int = 0
    """Images at a time; 0 takes 1 for sampling and 4 for training."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products; sampling also keeps the parameters in it."""
    guidance: float | None = None
    """Classifier-free guidance scale of the sampler, and the next two: the config's if left out."""
    top_k: int | None = None
    """Of the sampler; 0 is off."""
    top_p: float | None = None
    """Of the sampler; 1 is off."""
    steps: int = 0
    """Decode steps of the sampler, for orders that leave a choice (MAR); 0 takes the config's."""
    segments: int = 4
    """Parts in which the sampler's cache grows."""
    unroll: bool | None = None
    """Lay the layers out one by one in sampling. Left out: if a step reveals one token."""
    repeat: int = 7
    """Repetitions, each beside a measurement of the machine's limits; 0 only compiles, whatever the size of the model."""


def main(arguments: list[str]) -> None:
    try:
        options = tyro.cli(Options, args=taken(arguments), prog="python -m ar_jax.bench", description=__doc__)
        experiment = load_config(options.config)
        measure = {"sample": bench_sample, "train": bench_train}[options.what]
        for name, value in measure(experiment, options).items():
            print(f"{name:<34}{value}")
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"ar_jax.bench: {error}") from error


def bench_sample(experiment: Experiment, options: Options) -> dict[str, str]:
    """The token loop and the image decoder, against reading the weights once per step."""
    generator, tokenizer, params, frozen = networks(experiment, options)
    images, dtype = options.batch or 1, jnp.dtype(options.dtype)
    shapes = jax.eval_shape if not options.repeat else lambda function, *arguments: function(*arguments)
    params = shapes(lambda params: jax.tree.map(lambda x: x.astype(dtype), params), params)
    settings = experiment.generator.sampling
    chosen = {name: value for name in ("guidance", "top_k", "top_p") if (value := getattr(options, name)) is not None}
    settings = dataclasses.replace(settings, **chosen)
    generator, tokenizer = arrange(settings, generator, tokenizer)
    order_fn = in_steps(experiment.generator.order, options.steps)
    order = order_fn(generator.spec, jax.random.split(jax.random.key(0), images), images, 0)
    steps = len(order.sizes)
    if set(order.sizes) == {1} if options.unroll is None else options.unroll:
        laid_out = []
        params = shapes(lambda params: laid_out.append(generator.unrolled(params)) or laid_out[0][1], params)
        generator = laid_out[0][0]
    knobs, guided = make_knobs(settings, order, generator.spec.scales)

    def tokens(params, frozen, batch, keys):
        call = functools.partial(tokenizer.apply, {"params": frozen})
        return sample(
            generator, params, batch, order, tokenizer=call, knobs=knobs, keys=keys, guided=guided,
            segments=options.segments,
        )  # fmt: skip

    draw = jax.jit(tokens)

    @jax.jit
    def decode(frozen, tokens):
        return to_uint8(tokenizer.apply({"params": frozen}, tokens, method="decode"))

    batch, keys = conditions(generator, images), jax.random.split(jax.random.key(1), images)
    loop = Timer(draw, params, frozen, batch, keys, run=options.repeat > 0)
    pixels = Timer(decode, frozen, loop.result, run=options.repeat > 0)
    read = step_bytes(params)
    rows = images * (2 if guided else 1)
    operations = model_flops(tokens, params, frozen, batch, keys)
    of_decoder = model_flops(decode, frozen, jax.eval_shape(draw, params, frozen, batch, keys))
    first = {
        "images, rows, steps": f"{images}, {rows}, {steps}",
        "compile token loop, decoder": f"{loop.compile:.1f} s, {pixels.compile:.1f} s",
        "calls of the host in the loop": f"{len(HOST.findall(loop.text))}",
        "operations of the loop, decoder": f"{operations / 1e9:.0f}, {of_decoder / 1e9:.0f} GFLOP",
        "weights read a step": f"{read / 1e6:.0f} MB",
    }
    if not options.repeat:
        return first
    bandwidth, peak, of_bandwidth, of_peak, decoder_of_peak = [], [], [], [], []
    for _ in range(options.repeat):
        bandwidth.append(read_bandwidth(read))
        peak.append(matmul_peak(dtype))
        seconds = loop.run()
        of_bandwidth.append(steps * read / bandwidth[-1] / seconds)
        of_peak.append(operations / peak[-1] / seconds)
        decoder_of_peak.append(of_decoder / peak[-1] / pixels.run())
    return {
        **first,
        "token loop": f"{loop.best:.2f} s, {loop.best / steps * 1e3:.2f} ms a step",
        "image decoder": f"{pixels.best:.2f} s",
        "images/s (both)": f"{images / (loop.best + pixels.best):.3f}",
        "memory bandwidth, measured": f"{max(bandwidth) / 1e9:.1f} GB/s",
        "matmul peak, measured": f"{max(peak) / 1e9:.0f} GFLOP/s",
        "token loop, share of bandwidth": shares(of_bandwidth),
        "token loop, share of matmul peak": shares(of_peak),
        "decoder, share of matmul peak": shares(decoder_of_peak),
    }


def bench_train(experiment: Experiment, options: Options) -> dict[str, str]:
    """One update of the generator on ready tokens, against the matmul peak."""
    images = options.batch or 4
    generator, tokenizer, params, frozen = networks(experiment, options)
    stage, dtype = experiment.generator, jnp.dtype(options.dtype)
    order = stage.train_order or stage.order
    tx = make_optimiser(stage.optim, max(stage.steps, stage.optim.warmup + 1))
    loss = generator_loss(generator, tokenizer, order, stage.drop)
    update = make_update(gradients(loss), tx, ema=stage.optim.ema)
    shapes = jax.eval_shape if not options.repeat else lambda function, *arguments: function(*arguments)
    state = shapes(lambda params: create({"model": params}, {}, tx, stage.optim.ema), params)
    spec, shape = generator.spec, generator.spec.zeros(images).shape
    tokens = jax.random.normal(jax.random.key(2), shape)
    if spec.codes:
        tokens = jax.random.randint(jax.random.key(2), shape, 0, spec.codes[0])
    batch = conditions(generator, images) | {"tokens": tokens}
    plain = generator_loss(without_remat(generator), tokenizer, order, stage.drop)
    flops = model_flops(jax.grad(plain, has_aux=True), params, frozen, batch, jax.random.key(3), 0)
    step = Timer(
        jax.jit(update, donate_argnums=0), state, frozen, batch, jax.random.key(3), carry=True, run=options.repeat > 0
    )
    first = {
        "images, tokens": f"{images}, {images * generator.spec.n}",
        "compile": f"{step.compile:.1f} s",
        "model operations a step": f"{flops / 1e9:.0f} GFLOP",
    }
    if not options.repeat:
        return first
    peak, of_peak = [], []
    for _ in range(options.repeat):
        peak.append(matmul_peak(dtype))
        of_peak.append(flops / peak[-1] / step.run())
    return {
        **first,
        "step": f"{step.best:.2f} s",
        "steps/s, images/s": f"{1 / step.best:.3f}, {images / step.best:.3f}",
        "matmul peak, measured": f"{max(peak) / 1e9:.0f} GFLOP/s",
        "share of matmul peak": shares(of_peak),
    }


class Timer:
    """Compiles a function once and keeps its text and the best of its run times in seconds."""

    def __init__(self, function: Callable, *arguments: Any, carry: bool = False, run: bool = True):
        start = time.perf_counter()
        self._function = function.lower(*arguments).compile()
        self.compile, self.best, self.text = time.perf_counter() - start, float("inf"), self._function.as_text()
        self._arguments, self._carry = arguments, carry
        self.result = self._call() if run else jax.eval_shape(function, *arguments)

    def run(self) -> float:
        start = time.perf_counter()
        self._call()
        seconds = time.perf_counter() - start
        self.best = min(self.best, seconds)
        return seconds

    def _call(self):
        self.result = jax.block_until_ready(self._function(*self._arguments))
        if self._carry:  # the first argument was donated
            self._arguments = (self.result[0], *self._arguments[1:])
        return self.result


def shares(parts: list[float]) -> str:
    return f"{np.median(parts):.0%} ({min(parts):.0%} to {max(parts):.0%})"


def networks(experiment: Experiment, options: Options) -> tuple[Any, Any, Params, Params]:
    """Generator, tokenizer, and random parameters of both; without repetitions their shapes."""
    generator, tokenizer = untrained(experiment)
    if generator is None:
        raise ValueError("the config has no generator")
    dtype = jnp.dtype(options.dtype).type
    generator = with_fields(generator, dtype=dtype)
    make = (lambda init: jax.jit(init)) if options.repeat else (lambda init: functools.partial(jax.eval_shape, init))
    params, frozen = (make(net.init_params)(jax.random.key(0)) for net in (generator, tokenizer))
    return generator, tokenizer, params, frozen


def conditions(generator: Any, images: int) -> Batch:
    return jax.tree.map(lambda x: jnp.repeat(x, images, axis=0), generator.conditioning.example())


def step_bytes(params: Params) -> int:
    """Bytes of the parameters that every decoding step reads: all but tables of which it reads a row, and conditions."""
    flat = traverse_util.flatten_dict(params, sep="/")
    return sum(
        x.size * x.dtype.itemsize for name, x in flat.items() if not name.startswith(("inputs/", "conditioning/"))
    )


def matmul_peak(dtype: Any) -> float:
    """Fastest of several matrix products, in operations per second."""
    best = 0.0
    for m, k, n in ((2048, 2048, 2048), (1024, 768, 2304), (1024, 2048, 768), (4096, 1024, 1024)):
        a, b = jnp.ones((m, k), dtype), jnp.ones((k, n), dtype)
        best = max(best, 2 * m * k * n / _best_time(_matmul, a, b))
    return best


def read_bandwidth(size: int) -> float:
    """Fastest reading of `size` bytes by all cores, in bytes per second."""
    x = jnp.ones(size // 4 // 2**16 * 2**16, jnp.float32)
    # which of these keeps all cores busy differs from machine to machine
    return max(x.nbytes / _best_time(_total, x.reshape(rows, -1)) for rows in (1, 2, os.cpu_count() or 1, 2**10))


@jax.jit
def _matmul(a, b):
    return a @ b


@jax.jit
def _total(x):
    return x.sum(axis=1)


def _best_time(function, *arguments, repeat=4):
    best = float("inf")
    jax.block_until_ready(function(*arguments))
    for _ in range(repeat):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        best = min(best, time.perf_counter() - start)
    return best


if __name__ == "__main__":
    use_huge_pages()
    main(sys.argv[1:])
