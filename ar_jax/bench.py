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
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import traverse_util

from ar_jax.config import Experiment, GeneratorStage, load_config, parse
from ar_jax.decode.sampling import Sampling, looking
from ar_jax.decode.sequential import Claim, Sequential
from ar_jax.files import codec
from ar_jax.files.images import to_uint8
from ar_jax.files.models import untrained
from ar_jax.files.places import path_of, reachable
from ar_jax.files.trust import taken
from ar_jax.machine.chips import peak_flops, unknown
from ar_jax.machine.flops import model_flops, with_fields, without_remat
from ar_jax.machine.huge_pages import use_huge_pages
from ar_jax.machine.precision import Precision, multiply_in
from ar_jax.nets.linear import cast
from ar_jax.options import SHORT, Sampler, options_of, sampling_file
from ar_jax.orders import OrderFn
from ar_jax.sampler import open_drawer
from ar_jax.train.optim import decayed, make_optimiser
from ar_jax.train.recipes import generator_loss, gradients, update_settings
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
    """Of matrix products; sampling also keeps kernels and embeddings in it."""
    precision: Precision = "default"
    """Of products of float32 numbers: GPUs take tensorfloat32 by default, TPUs bfloat16; highest is float32."""
    sampling: str = ""
    """A Python file whose `get_sampling(own)` returns how images are drawn, as for sample.py; of a config, its
    `generator.sampling` can be changed field by field too."""
    unroll: bool | None = None
    """Lay the layers out one by one in sampling. Left out: if most steps reveal one token."""
    repeat: int = 7
    """Repetitions, each beside a measurement of the machine's limits; 0 only compiles, whatever the size of the model."""


def main(arguments: list[str]) -> None:
    prog = "python -m ar_jax.bench"
    try:
        arguments = reachable(taken(arguments))
        if "--help" in arguments or "-h" in arguments or len(arguments) < 2:
            tyro.cli(Options, args=["--help"], prog=prog, description=__doc__)
        options, rest = tyro.cli(Options, args=arguments, prog=prog, return_unknown_args=True)
        codec.check(options)
        if options.what == "sample" and path_of(options.config).is_dir():
            subject = of_run(options, rest)
        else:
            subject = of_config(
                parse(load_config(options.config), _spelt(rest), f"{prog} {options.config}", ""), options
            )
        bench, rows = {"sample": (bench_sample, rows_of_sampling), "train": (bench_train, rows_of_training)}[
            options.what
        ]
        with multiply_in(options.precision):
            compiled = bench(subject, options)
            figures = compiled.measure(subject.weights()) if options.repeat else compiled.facts
        for name, value in rows(figures).items():
            print(f"{name:<34}{value}")
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"ar_jax.bench: {error}") from error


class Subject(NamedTuple):
    """What is measured.

    Attributes:
      generator, tokenizer: the networks.
      params, frozen: shapes of their parameters.
      weights: () -> parameters of both.
      order: of decoding.
      sampling: how images are drawn.
      stage: of training; None for a run.
    """

    generator: Any
    tokenizer: Any
    params: Params
    frozen: Params
    weights: Callable[[], tuple[Params, Params]]
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
    init = jax.jit(lambda key: (generator.init_params(key), tokenizer.init_params(key)))
    params, frozen = jax.eval_shape(init, jax.random.key(0))
    sampling = sampling_file(options.sampling, stage.sampling)
    weights = functools.partial(init, jax.random.key(0))
    return Subject(generator, tokenizer, params, frozen, weights, stage.order, sampling, stage)


def of_run(options: Options, rest: list[str]) -> Subject:
    """The networks of a run folder, drawn from as sample.py does; `rest` are the options of its sampling."""
    own, spelt = options_of([options.config, *rest, *(["--sampling", options.sampling] if options.sampling else [])])
    own = tyro.cli(
        Sampler, args=spelt[1:], default=own, prog="python -m ar_jax.bench", config=(tyro.conf.AvoidSubcommands,)
    )
    drawer = open_drawer(options.config, dataclasses.replace(own, parts=options.sampling))
    model, sampling = drawer.model, drawer.sampling
    params, frozen = model.params(), drawer.tokenizer.params()
    return Subject(
        with_fields(model.module, dtype=jnp.dtype(options.dtype).type), drawer.tokenizer.module, shapes(params),
        shapes(frozen), lambda: (params, frozen), model.order, sampling,
    )  # fmt: skip


class Limits(NamedTuple):
    """What the machine can do: operations of matrix products per second, and bytes per second."""

    peak: float
    bandwidth: float


def limits(size: int, dtype: Any) -> Limits:
    """Measured, the bandwidth by reading `size` bytes."""
    return Limits(matmul_peak(dtype), read_bandwidth(size))


class Bench(NamedTuple):
    """Compiled programs.

    Attributes:
      facts: figures known without running, by name; seconds, bytes, operations.
      measure: weights -> all figures. `limits` (bytes read a step, dtype -> Limits) is called beside every repetition.
    """

    facts: dict[str, Any]
    measure: Callable[..., dict[str, Any]]


def bench_sample(subject: Subject, options: Options) -> Bench:
    """The token loop and the image decoder, against reading the weights once per step."""
    sampling, frozen = subject.sampling, subject.frozen
    images, dtype = options.batch or 1, jnp.dtype(options.dtype)
    generator, tokenizer, order_fn = sampling.adapted(subject.generator, subject.tokenizer, subject.order)
    order = order_fn(generator.spec, jax.random.split(jax.random.key(0), images), images, 0)
    steps, stacked = len(order.sizes), generator
    unroll = order.by_token if options.unroll is None else options.unroll

    @jax.jit
    def laid_out(params):
        params = cast(params, dtype)
        return stacked.unrolled(params)[1] if unroll else params

    if unroll:
        generator = _unrolled(generator, subject.params)
    params = jax.eval_shape(laid_out, subject.params)
    guided = bool((sampling.knobs(order, generator.spec).guidance != 1).any())

    def program(sampling):
        def tokens(params, frozen, batch, keys):
            call = functools.partial(tokenizer.apply, {"params": frozen})
            look = looking(tokenizer, call, keys)
            return sampling.tokens(generator, params, batch, order, tokenizer=call, keys=keys, look=look)

        return tokens

    @jax.jit
    def decode(frozen, tokens):
        return to_uint8(tokenizer.apply({"params": frozen}, tokens, method="decode"))  # one that takes captions: without

    if options.repeat:
        laid_out = laid_out.lower(subject.params).compile()
    batch, keys = conditions(generator, images), jax.random.split(jax.random.key(1), images)
    arguments = (params, frozen, batch, keys)
    loop = Timer(jax.jit(program(sampling)), *arguments)
    pixels = Timer(decode, frozen, loop.result[0])
    # what stands beside every other decoder: one step after the other
    plain = (
        sampling
        if isinstance(sampling.decoder, Sequential) and sampling.decoder.claim is Claim.SAME_TOKENS
        else dataclasses.replace(sampling, decoder=Sequential())
    )
    beside = None if plain is sampling else Timer(jax.jit(program(plain)), *arguments)
    read, rows = step_bytes(params), images * (2 if guided else 1)
    operations = model_flops(lambda *arguments: program(plain)(*arguments)[0], *arguments)
    of_decoder = model_flops(decode, frozen, loop.result[0])
    facts = {
        "images": images, "rows": rows, "steps": steps, "decoder": repr(sampling.decoder), "claim": sampling.decoder.claim.value,
        "compile": (loop.compile, pixels.compile), "host": len(HOST.findall(loop.text)),
        "memory": max(loop.memory, pixels.memory), "operations": (operations, of_decoder), "read": read,
    }  # fmt: skip

    def measure(weights: tuple[Params, Params], limits: Callable = limits) -> dict[str, Any]:
        weights, frozen = weights
        run = (laid_out(weights), frozen, batch, keys)
        tokens, account = loop.start(*run)
        pixels.start(frozen, tokens)
        found = {name: [] for name in ("bandwidth", "peak", "loop", "pixels", "beside")}
        if beside:
            usual, usually = beside.start(*run)
            found["equal"] = float(np.mean(np.asarray(tokens) == np.asarray(usual)))
            found["usual"] = {name: float(np.mean(count)) for name, count in usually.calls.items()}
            found["accepted"] = tokens.shape[1] / float(np.mean(account.calls["generator"]))
        for _ in range(options.repeat):
            peak, bandwidth = limits(read, dtype)
            found["peak"].append(peak)
            found["bandwidth"].append(bandwidth)
            found["loop"].append(loop.run())
            found["pixels"].append(pixels.run())
            if beside:
                found["beside"].append(beside.run())
        return facts | found | {"calls": {name: float(np.mean(count)) for name, count in account.calls.items()}}

    return Bench(facts, measure)


def bench_train(subject: Subject, options: Options) -> Bench:
    """One update of the generator on ready tokens, against the matmul peak."""
    images, stage, dtype = options.batch or 4, subject.stage, jnp.dtype(options.dtype)
    generator, tokenizer, params, frozen = subject[:4]
    order = stage.train_order or stage.order
    networks = {"model": decayed(generator.init_params)}
    tx = make_optimiser(stage.optim, max(stage.steps, stage.optim.warmup + 1), networks)
    loss = generator_loss(generator, tokenizer, order, stage.drop)
    update = make_update(gradients(loss), tx, **update_settings(stage.optim) | {"accumulate": 1})
    begin = jax.jit(lambda params: create({"model": params}, {}, tx, stage.optim.ema))
    spec, shape = generator.spec, generator.spec.zeros(images).shape
    tokens = jax.random.normal(jax.random.key(2), shape)
    if spec.codes:
        tokens = jax.random.randint(jax.random.key(2), shape, 0, np.array(spec.codes))
    batch, key = conditions(generator, images) | {"tokens": tokens}, jax.random.key(3)
    plain = generator_loss(without_remat(generator), tokenizer, order, stage.drop)
    flops = model_flops(jax.grad(plain, has_aux=True), params, frozen, batch, key, 0)
    state = jax.eval_shape(begin, params)
    if options.repeat:
        begin = begin.lower(params).compile()
    step = Timer(jax.jit(update, donate_argnums=0), state, frozen, batch, key, carry=True)
    facts = {
        "images": images, "tokens": images * spec.n, "compile": step.compile, "memory": step.memory, "operations": flops,
    }  # fmt: skip

    def measure(weights: tuple[Params, Params], limits: Callable = limits) -> dict[str, Any]:
        params, frozen = weights
        step.start(begin(params), frozen, batch, key)
        found = {"peak": [], "step": []}
        for _ in range(options.repeat):
            found["peak"].append(limits(0, dtype).peak)
            found["step"].append(step.run())
        return facts | found

    return Bench(facts, measure)


def rows_of_sampling(f: dict[str, Any]) -> dict[str, str]:
    """The table of `bench_sample`, from its facts or all its figures."""
    operations, of_decoder = f["operations"]
    rows = {
        "images, rows, steps": f"{f['images']}, {f['rows']}, {f['steps']}",
        "decoder": f["decoder"],
        "compile token loop, image decoder": "{:.1f} s, {:.1f} s".format(*f["compile"]),
        "calls of the host in the loop": f"{f['host']}",
        "operations of the loop, decoder": f"{operations / 1e9:.0f}, {of_decoder / 1e9:.0f} GFLOP",
        "weights read a step": f"{f['read'] / 1e6:.0f} MB",
        "memory of the larger program": f"{f['memory'] / 1e9:.2f} GB",
    }
    if "calls" not in f:
        return rows
    rows["calls an image"] = ", ".join(f"{count:.4g} of the {name}" for name, count in f["calls"].items())
    if f["beside"]:
        usual = ", ".join(f"{count:.4g}" for count in f["usual"].values())
        rows["beside Sequential"] = f"{usual} calls, {f['equal']:.2%} of the tokens equal (it claims {f['claim']})"
        rows["tokens accepted a call"] = f"{f['accepted']:.2f}"
    loop, pixels, peak, bandwidth = (np.array(f[name]) for name in ("loop", "pixels", "peak", "bandwidth"))
    rows |= {
        "token loop": f"{loop.min():.3g} s, {loop.min() / f['steps'] * 1e3:.3g} ms a token step",
        "image decoder": f"{pixels.min():.3g} s",
        "images/s (both)": f"{f['images'] / (loop.min() + pixels.min()):.4g}",
        "memory bandwidth, measured": f"{bandwidth.max() / 1e9:.1f} GB/s",
        "matmul peak, measured": f"{peak.max() / 1e9:.0f} GFLOP/s",
        "token loop, share of bandwidth": shares(f["steps"] * f["read"] / bandwidth / loop),
        "token loop, share of matmul peak": shares(operations / peak / loop),
        "decoder, share of matmul peak": shares(of_decoder / peak / pixels),
        **published(operations, loop),
    }
    return rows | ({"time beside Sequential": shares(loop / np.array(f["beside"]))} if f["beside"] else {})


def rows_of_training(f: dict[str, Any]) -> dict[str, str]:
    """The table of `bench_train`, from its facts or all its figures."""
    rows = {
        "images, tokens": f"{f['images']}, {f['tokens']}",
        "compile": f"{f['compile']:.1f} s",
        "model operations a step": f"{f['operations'] / 1e9:.0f} GFLOP",
        "memory of the program": f"{f['memory'] / 1e9:.2f} GB",
    }
    if "step" not in f:
        return rows
    step, peak = np.array(f["step"]), np.array(f["peak"])
    return rows | {
        "step": f"{step.min():.3g} s",
        "steps/s, images/s": f"{1 / step.min():.4g}, {f['images'] / step.min():.4g}",
        "matmul peak, measured": f"{peak.max() / 1e9:.0f} GFLOP/s",
        "share of matmul peak": shares(f["operations"] / peak / step),
        **published(f["operations"], step),
    }


def published(operations: float, seconds: np.ndarray) -> dict[str, str]:
    """MFU: the share of the bfloat16 peak that the maker of the chip publishes."""
    device = jax.devices()[0]
    peak = peak_flops(device)
    said = f"{np.median(operations / seconds) / peak:.1%} of {peak / 1e12:.0f} TFLOP/s" if peak else unknown(device)
    return {"share of the published peak (MFU)": said}


class Timer:
    """A function compiled for arguments of these shapes, run again and again.

    Attributes:
      compile: seconds it took.
      text: of the program.
      memory: bytes that the program needs: arguments, results and temporaries.
      result: of the last run; before any its shapes.
    """

    def __init__(self, function: Callable, *arguments: Any, carry: bool = False):
        start = time.perf_counter()
        self._function = function.lower(*arguments).compile()
        self.compile, self.text, self._carry = time.perf_counter() - start, self._function.as_text(), carry
        need = self._function.memory_analysis()
        self.memory = (
            need.argument_size_in_bytes + need.output_size_in_bytes - need.alias_size_in_bytes + need.temp_size_in_bytes
        )
        self.result = jax.eval_shape(function, *arguments)

    def start(self, *arguments: Any) -> Any:
        """Takes the arguments and runs once; with `carry`, the first was donated and follows from the last result."""
        self._arguments = arguments
        self.run()
        return self.result

    def run(self) -> float:
        """Seconds of a run."""
        start = time.perf_counter()
        self.result = jax.block_until_ready(self._function(*self._arguments))
        seconds = time.perf_counter() - start
        if self._carry:
            self._arguments = (self.result[0], *self._arguments[1:])
        return seconds


def _unrolled(generator: Any, params: Params) -> Any:
    """The generator with its layers one by one."""
    found = []
    jax.eval_shape(lambda params: found.append(generator.unrolled(params)) or found[0][1], params)
    return found[0][0]


def shapes(tree: Any) -> Any:
    return jax.eval_shape(lambda tree: tree, tree)


def shares(parts: np.ndarray) -> str:
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
    return max(2 * m * k * n / product_time(m, k, n, dtype) for m, k, n in products())


def products() -> tuple[tuple[int, int, int], ...]:
    """Rows, inner size and columns of products, large enough that the machine shows what it can."""
    if jax.default_backend() == "cpu":
        return ((2048, 2048, 2048), (1024, 768, 2304), (1024, 2048, 768), (4096, 1024, 1024))
    return ((8192, 8192, 8192), (16384, 4096, 4096), (4096, 4096, 4096), (32768, 1024, 4096))


def product_time(m: int, k: int, n: int, dtype: Any) -> float:
    """Seconds of a matrix product of random numbers: a GPU is faster on ones, which need less power."""
    a, b = (_random(shape, jnp.dtype(dtype)) for shape in ((m, k), (k, n)))
    return _best_time(_matmul, a, b)


def read_bandwidth(size: int) -> float:
    """Fastest reading of `size` bytes by all cores, in bytes per second."""
    x = jnp.ones(size // 4 // 2**16 * 2**16, jnp.float32)
    # which of these keeps all cores busy differs from machine to machine
    return max(x.nbytes / _best_time(_total, x.reshape(rows, -1)) for rows in (1, 2, os.cpu_count() or 1, 2**10))


@jax.jit
def _matmul(a, b):
    return a @ b


@functools.partial(jax.jit, static_argnums=(0, 1))
def _random(shape, dtype):
    return jax.random.normal(jax.random.key(0), shape, dtype)


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
