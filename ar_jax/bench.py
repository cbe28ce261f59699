"""Speed of a config beside what the machine can do.

    python -m ar_jax.bench sample CONFIG [--batch 1]
    python -m ar_jax.bench train CONFIG [--batch 4]

    python -m ar_jax.bench sample configs/llamagen.py:b_256
    python -m ar_jax.bench train configs/llamagen.py:b_256
    python -m ar_jax.bench sample configs/mar.py:b_256 --steps 64
    python -m ar_jax.bench sample runs/mnist5k_llamagen --sampling configs/sampling/jacobi.py     beside one by one
    python -m ar_jax.bench sample configs/var.py:d30 --repeat 0           how long compilation takes

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
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import traverse_util

from ar_jax.config import Experiment, GeneratorStage, load_config, parse
from ar_jax.decode.sampling import Sampling
from ar_jax.decode.sequential import Sequential
from ar_jax.files.images import to_uint8
from ar_jax.files.models import untrained
from ar_jax.files.trust import taken
from ar_jax.machine.flops import model_flops, with_fields, without_remat
from ar_jax.machine.huge_pages import use_huge_pages
from ar_jax.orders import OrderFn
from ar_jax.sampler import SHORT, Sampler, open_drawer, options_of, sampling_file
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
    """Config file, whose weights are random; for sampling also a run folder."""
    batch: int = 0
    """Images at a time; 0 takes 1 for sampling and 4 for training."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products; sampling also keeps the parameters in it."""
    sampling: str = ""
    """A Python file whose `get_sampling(own)` returns how images are drawn, as for sample.py; of a config, its
    `generator.sampling` can be changed field by field too."""
    unroll: bool | None = None
    """Lay the layers out one by one in sampling. Left out: if a step reveals one token."""
    repeat: int = 7
    """Repetitions, each beside a measurement of the machine's limits; 0 only compiles, whatever the size of the model."""


def main(arguments: list[str]) -> None:
    prog = "python -m ar_jax.bench"
    try:
        arguments = taken(arguments)
        if "--help" in arguments or "-h" in arguments or len(arguments) < 2:
            tyro.cli(Options, args=["--help"], prog=prog, description=__doc__)
        options, rest = tyro.cli(Options, args=arguments, prog=prog, return_unknown_args=True)
        if options.what == "sample" and Path(options.config).is_dir():
            subject = of_run(options, rest)
        else:
            subject = of_config(parse(load_config(options.config), _spelt(rest), f"{prog} {options.config}", ""), options)
        measure = {"sample": bench_sample, "train": bench_train}[options.what]
        for name, value in measure(subject, options).items():
            print(f"{name:<34}{value}")
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"ar_jax.bench: {error}") from error


class Subject(NamedTuple):
    """What is measured.

    Attributes:
      generator, tokenizer: the networks.
      params, frozen: their parameters; without repetitions their shapes.
      order: of decoding.
      sampling: how images are drawn.
      stage: of training; None for a run.
    """

    generator: Any
    tokenizer: Any
    params: Params
    frozen: Params
    order: OrderFn
    sampling: Sampling
    stage: GeneratorStage | None = None


def _spelt(arguments: list[str]) -> list[str]:
    """Short names of sample.py's options as those of a config's settings."""
    for short, (long, *_) in SHORT.items():
        place = "--generator." if long.startswith("order.") else "--generator.sampling."
        arguments = [place + long if word == f"--{short}" else word for word in arguments]
    return arguments


def of_config(experiment: Experiment, options: Options) -> Subject:
    """Networks with random parameters."""
    generator, tokenizer = untrained(experiment)
    if generator is None:
        raise ValueError("the config has no generator")
    stage = experiment.generator
    generator = with_fields(generator, dtype=jnp.dtype(options.dtype).type)
    make = (lambda init: jax.jit(init)) if options.repeat else (lambda init: functools.partial(jax.eval_shape, init))
    params, frozen = (make(net.init_params)(jax.random.key(0)) for net in (generator, tokenizer))
    sampling = sampling_file(options.sampling, stage.sampling)
    if sampling.decoder == Sequential():  # for the bandwidth that the whole cache would cost
        sampling = dataclasses.replace(sampling, decoder=Sequential(4))
    return Subject(generator, tokenizer, params, frozen, stage.order, sampling, stage)


def of_run(options: Options, rest: list[str]) -> Subject:
    """The networks of a run folder, drawn from as sample.py does; `rest` are the options of its sampling."""
    own, spelt = options_of([options.config, *rest, *(["--sampling", options.sampling] if options.sampling else [])])
    own = tyro.cli(
        Sampler, args=spelt[1:], default=own, prog="python -m ar_jax.bench", config=(tyro.conf.AvoidSubcommands,)
    )
    drawer = open_drawer(options.config, dataclasses.replace(own, parts=options.sampling))
    model, sampling = drawer.model, drawer.sampling
    return Subject(
        with_fields(model.module, dtype=jnp.dtype(options.dtype).type), drawer.tokenizer.module, model.params(),
        drawer.tokenizer.params(), model.order, sampling,
    )  # fmt: skip


def bench_sample(subject: Subject, options: Options) -> dict[str, str]:
    """The token loop and the image decoder, against reading the weights once per step."""
    sampling, params, frozen = subject.sampling, subject.params, subject.frozen
    images, dtype = options.batch or 1, jnp.dtype(options.dtype)
    shapes = jax.eval_shape if not options.repeat else lambda function, *arguments: function(*arguments)
    params = shapes(lambda params: jax.tree.map(lambda x: x.astype(dtype), params), params)
    generator, tokenizer, order_fn = sampling.adapted(subject.generator, subject.tokenizer, subject.order)
    order = order_fn(generator.spec, jax.random.split(jax.random.key(0), images), images, 0)
    steps = len(order.sizes)
    if set(order.sizes) == {1} if options.unroll is None else options.unroll:
        laid_out = []
        params = shapes(lambda params: laid_out.append(generator.unrolled(params)) or laid_out[0][1], params)
        generator = laid_out[0][0]
    guided = bool((sampling.knobs(order, generator.spec).guidance != 1).any())

    def program(sampling):
        def tokens(params, frozen, batch, keys):
            call = functools.partial(tokenizer.apply, {"params": frozen})
            return sampling.tokens(generator, params, batch, order, tokenizer=call, keys=keys)

        return tokens

    @jax.jit
    def decode(frozen, tokens):
        return to_uint8(tokenizer.apply({"params": frozen}, tokens, method="decode"))

    batch, keys = conditions(generator, images), jax.random.split(jax.random.key(1), images)
    arguments, run = (params, frozen, batch, keys), options.repeat > 0
    loop = Timer(jax.jit(program(sampling)), *arguments, run=run)
    pixels = Timer(decode, frozen, loop.result[0], run=run)
    # what stands beside every other decoder: one step after the other
    plain = (
        sampling if isinstance(sampling.decoder, Sequential) else dataclasses.replace(sampling, decoder=Sequential(4))
    )
    beside = None if plain is sampling else Timer(jax.jit(program(plain)), *arguments, run=run)
    read, rows = step_bytes(params), images * (2 if guided else 1)
    operations = model_flops(lambda *arguments: program(plain)(*arguments)[0], *arguments)
    of_decoder = model_flops(decode, frozen, jax.eval_shape(lambda x: x, loop.result[0]))
    first = {
        "images, rows, steps": f"{images}, {rows}, {steps}",
        "decoder": repr(sampling.decoder),
        "compile token loop, image decoder": f"{loop.compile:.1f} s, {pixels.compile:.1f} s",
        "calls of the host in the loop": f"{len(HOST.findall(loop.text))}",
        "operations of the loop, decoder": f"{operations / 1e9:.0f}, {of_decoder / 1e9:.0f} GFLOP",
        "weights read a step": f"{read / 1e6:.0f} MB",
    }
    if not options.repeat:
        return first
    tokens, account = loop.result
    first["calls an image"] = ", ".join(f"{np.mean(count):.4g} of the {name}" for name, count in account.calls.items())
    if beside:
        equal = np.mean(np.asarray(tokens) == np.asarray(beside.result[0]))
        usual = ", ".join(f"{np.mean(count):.4g}" for count in beside.result[1].calls.values())
        first["beside Sequential"] = (
            f"{usual} calls, {equal:.2%} of the tokens equal (it claims {sampling.decoder.claim.value})"
        )
        first["tokens accepted a call"] = f"{tokens.shape[1] / np.mean(account.calls['generator']):.2f}"
    bandwidth, peak, of_bandwidth, of_peak, decoder_of_peak, of_sequential = [], [], [], [], [], []
    for _ in range(options.repeat):
        bandwidth.append(read_bandwidth(read))
        peak.append(matmul_peak(dtype))
        seconds = loop.run()
        of_bandwidth.append(steps * read / bandwidth[-1] / seconds)
        of_peak.append(operations / peak[-1] / seconds)
        decoder_of_peak.append(of_decoder / peak[-1] / pixels.run())
        if beside:
            of_sequential.append(seconds / beside.run())
    found = {
        **first,
        "token loop": f"{loop.best:.2f} s, {loop.best / steps * 1e3:.2f} ms a token step",
        "image decoder": f"{pixels.best:.2f} s",
        "images/s (both)": f"{images / (loop.best + pixels.best):.3f}",
        "memory bandwidth, measured": f"{max(bandwidth) / 1e9:.1f} GB/s",
        "matmul peak, measured": f"{max(peak) / 1e9:.0f} GFLOP/s",
        "token loop, share of bandwidth": shares(of_bandwidth),
        "token loop, share of matmul peak": shares(of_peak),
        "decoder, share of matmul peak": shares(decoder_of_peak),
    }
    return found | ({"time beside Sequential": shares(of_sequential)} if beside else {})


def bench_train(subject: Subject, options: Options) -> dict[str, str]:
    """One update of the generator on ready tokens, against the matmul peak."""
    images, stage, dtype = options.batch or 4, subject.stage, jnp.dtype(options.dtype)
    generator, tokenizer, params, frozen = subject[:4]
    order = stage.train_order or stage.order
    tx = make_optimiser(stage.optim, max(stage.steps, stage.optim.warmup + 1))
    loss = generator_loss(generator, tokenizer, order, stage.drop)
    update = make_update(gradients(loss), tx, ema=stage.optim.ema)
    shapes = jax.eval_shape if not options.repeat else lambda function, *arguments: function(*arguments)
    state = shapes(lambda params: create({"model": params}, {}, tx, stage.optim.ema), params)
    spec, shape = generator.spec, generator.spec.zeros(images).shape
    tokens = jax.random.normal(jax.random.key(2), shape)
    if spec.codes:
        tokens = jax.random.randint(jax.random.key(2), shape, 0, np.array(spec.codes))
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
