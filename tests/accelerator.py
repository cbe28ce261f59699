"""Checks and measures on one accelerator, the most important first, within a budget of seconds.

    python tests/accelerator.py --out FOLDER [--budget 440] [--flags XLA_FLAGS] [--parity FOLDER] [--tiny]

Writes `results.json` and `table.md` into FOLDER, anew after every figure, so that a run which is cut short leaves what it
found. A check or measurement that fails is an entry with its error. Parts:

    checks    in a process of its own, with deterministic operations and products in full float32: images do not depend
              on their neighbours, Jacobi draws what one by one draws, a training resumes bit for bit, parity with the
              published models
    speed     peak of products and bandwidth of copies; then steps of training and sampling of the published configs in
              bfloat16, random weights, against both. Programs are compiled in threads, a round at a time, and run one
              after the other.

--flags=--xla_gpu_enable_command_buffer=+WHILE makes one CUDA graph of a whole token loop, where XLA makes one of a token.
--tiny takes networks that a CPU runs in seconds, to test this script.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import datetime
import functools
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from ar_jax import bench  # noqa: E402
from ar_jax.config import load_config, parse  # noqa: E402
from ar_jax.machine.chips import chip, unknown  # noqa: E402

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"  # sums by atomics end in other bits every time
MODELS = {  # config, overrides
    "LlamaGen-B": ("configs/llamagen.py:b_256", ()),
    "LlamaGen-L": ("configs/llamagen.py:l_256", ()),
    "LlamaGen-XL": ("configs/llamagen.py:xl_256", ()),
    "VAR-d16": ("configs/var.py:d16", ()),
    "VAR-d30": ("configs/var.py:d30", ()),
    "MAR-B, 64 steps": ("configs/mar.py:b_256", ("--generator.order.steps", "64")),
    "xAR-B": ("configs/xar.py:b_256", ()),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """A measurement: training or sampling of a model with so many images at a time."""

    model: str
    what: str
    batch: int

    @property
    def name(self) -> str:
        return f"{self.model}, {self.what}, batch {self.batch}"


def jobs(*words: str) -> tuple[Job, ...]:
    """From "model | what | batch"."""
    return tuple(Job(model, what, int(batch)) for model, what, batch in (word.split(" | ") for word in words))


ROUNDS = (
    jobs(
        "LlamaGen-B | train | 64", "LlamaGen-B | sample | 1", "LlamaGen-B | sample | 64", "LlamaGen-L | train | 32",
        "VAR-d16 | train | 16", "VAR-d16 | sample | 64", "MAR-B, 64 steps | train | 64", "xAR-B | train | 32",
    ),
    jobs(
        "LlamaGen-XL | sample | 1", "LlamaGen-XL | sample | 64", "VAR-d30 | sample | 64", "VAR-d30 | sample | 1",
        "MAR-B, 64 steps | sample | 64", "MAR-B, 64 steps | sample | 1", "VAR-d16 | sample | 1",
    ),
    jobs(
        "LlamaGen-B | sample | 8", "LlamaGen-XL | sample | 8", "VAR-d16 | sample | 8", "VAR-d30 | sample | 8",
        "MAR-B, 64 steps | sample | 8",
    ),
)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--budget", type=float, default=440, help="seconds")
    parser.add_argument("--patience", type=float, default=150, help="seconds that the checks may hold up measurements")
    parser.add_argument("--parts", nargs="+", choices=("checks", "speed"), default=("checks", "speed"))
    parser.add_argument("--parity", type=Path, help="folder of the parity fixtures")
    parser.add_argument("--flags", default="", help="for XLA, of the measurements")
    parser.add_argument("--threads", type=int, default=8, help="programs compiled at a time")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.parts == ["checks"]:
        checks(Report(options.out / "checks.json", options.budget), options)
        return
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {options.flags}".strip()  # read when a device is used
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.85")  # the checks need memory too
    report = Report(options.out / "results.json", options.budget)
    speed(report, options)


class Report:
    """Entries, printed and written as they come."""

    def __init__(self, path: Path, budget: float):
        self.path, self.began, self.budget, self.entries = path, time.monotonic(), budget, []

    @property
    def left(self) -> float:
        return self.budget - (time.monotonic() - self.began)

    def add(self, part: str, name: str, **figures: Any) -> None:
        self.entries.append({"part": part, "name": name, "at": round(time.monotonic() - self.began, 1), **figures})
        said = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in figures.items()
        )
        print(f"[{self.entries[-1]['at']:6.1f} s] {part}: {name}: {said[:600]}", flush=True)
        self.path.write_text(json.dumps(self.entries, indent=1, default=str))

    def attempt(self, part: str, name: str, function: Callable[[], dict[str, Any]]) -> None:
        """An entry of what `function` finds, or of its error; nothing is tried once the time is over."""
        if self.left < 0:
            self.add(part, name, skipped="no time left")
            return
        start = time.monotonic()
        try:
            found = function()
        except Exception as error:  # one failure must not cost the rest
            trace = traceback.format_exc()
            found = {"error": f"{type(error).__name__}: {str(error)[:400]}", "where": trace[-1500:]}
        self.add(part, name, **found, seconds=round(time.monotonic() - start, 1))


# ---------------------------------------------------------------------------------------------------------- checks


def checks(report: Report, options: argparse.Namespace) -> None:
    """What must hold on any device, in float32."""
    with jax.default_matmul_precision("highest"):
        for name, check in laws():
            report.attempt("checks", name, check)
            if options.tiny:
                break
        report.attempt("checks", "a training resumes bit for bit", resume)
        for name, check in parity(options.parity) if options.parity else ():
            report.attempt("parity", name, check)


def laws() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    import test_laws
    import test_laws_continuous

    def alone(module, case, tolerance):
        together = module.sampled(case)
        single = np.concatenate([module.sampled(case, images=slice(i, i + 1)) for i in (0, case.images - 1)])
        both = together[[0, -1]]
        difference = float(np.abs(single - both).max())
        close = np.allclose(single, both, **tolerance) if tolerance else np.array_equal(single, both)
        return {"holds": bool(close), "largest difference": difference}

    for name in ("llamagen_caption", "var"):
        yield (
            f"{name}: an image does not depend on its neighbours",
            functools.partial(alone, test_laws, test_laws.CASES[name], {}),
        )
    yield (
        "mar: an image does not depend on its neighbours",
        functools.partial(alone, test_laws_continuous, test_laws_continuous.CASES["mar"], test_laws_continuous.CLOSE),
    )

    def jacobi():
        test_laws.test_jacobi_draws_the_tokens_of_one_after_the_other_in_fewer_calls("llamagen_caption")
        return {"holds": True}

    yield "llamagen_caption: Jacobi draws the tokens of one by one", jacobi


def kernel() -> dict[str, Any]:
    """Largest errors of attention and its gradients in bfloat16 against float32: by cuDNN, and written out."""
    from ar_jax.nets.attention import attend, fused, visible

    found, holds = {}, True
    for name, sizes in (
        ("triangle", (1,) * 256),
        ("scales", tuple(side**2 for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))),
    ):
        step = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        mask, keys = visible(step, step), jax.random.split(jax.random.key(0), 4)
        exact = [jax.random.normal(key, (4, 12, len(step), 64)) for key in keys]

        def both(attention, arrays):
            out, pull = jax.vjp(attention, *arrays[:3])
            return [x.astype(jnp.float32) for x in (out, *pull(arrays[3].astype(out.dtype)))]

        arrays = [x.astype(jnp.bfloat16) for x in exact]
        exact = [x.astype(jnp.float32) for x in arrays]
        with jax.default_matmul_precision("highest"):
            want = jax.jit(functools.partial(both, functools.partial(attend, mask=mask)))(exact)
        given = None if name == "triangle" else mask
        ways = {"cudnn": functools.partial(fused, mask=given), "written out": functools.partial(attend, mask=mask)}
        for way, attention in ways.items():
            got = jax.jit(functools.partial(both, attention))(arrays)
            found[f"{name}, {way}"] = [float(jnp.abs(a - b).max()) for a, b in zip(got, want)]
        largest = found[f"{name}, largest"] = [float(jnp.abs(x).max()) for x in want]
        # a few roundings of the largest number
        holds &= all(error <= 2**-7 * most for error, most in zip(found[f"{name}, cudnn"], largest))
    return {"holds": bool(holds), **found}


def resume() -> dict[str, Any]:
    """Trains a tiny tokenizer and generator; then once more from the generator's first checkpoint."""
    from kill_training import arrays
    from PIL import Image
    from test_train_sample import CONFIG, QUIET

    from ar_jax.train.__main__ import main as train

    with tempfile.TemporaryDirectory() as place:
        place, random = Path(place), np.random.default_rng(0)
        for i in range(24):
            path = place / "images" / str(i % 3) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(path)
        (place / "tiny.py").write_text(CONFIG)
        mesh = ("--mesh.data", "1") if jax.device_count() == 1 else ()
        data = ("--data.name", "image_folder", "--data.path", str(place / "images"))
        command = [str(place / "tiny.py"), "--out", str(place), *QUIET, *data, *mesh]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # progress bars
            train(command)
            shutil.copytree(place / "whole", place / "again")
            shutil.rmtree(place / "again" / "generator" / "checkpoints" / "6")
            train([*command, "--name", "again"])
        whole, again = (arrays(place / name, "generator") for name in ("whole", "again"))
    return {"holds": whole == again, "arrays": len(whole), "flags": os.environ.get("XLA_FLAGS", "")}


def parity(folder: Path) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """The parity folders that are there, by the entry of tests/test_parity.py."""
    os.environ["AR_JAX_PARITY"] = str(folder.resolve())
    import test_parity

    def compared(cases):
        wrong = []
        for values in cases:
            try:
                test_parity.test_parity(*values)
            except AssertionError as error:
                wrong.append(" ".join(str(error).split())[:300])
        return {"holds": not wrong, "cases": len(cases), "wrong": wrong}

    every = [param.values for param in test_parity._outputs()]
    for name, cases in itertools.groupby(every, key=lambda values: values[0]):
        if (folder / name / "meta.json").exists():
            yield name, functools.partial(compared, list(cases))


# ----------------------------------------------------------------------------------------------------------- speed


def speed(report: Report, options: argparse.Namespace) -> None:
    device = jax.devices()[0]
    report.add("machine", device.device_kind, **machine(device, options))
    limits = {}
    report.attempt("limits", "matrix products", lambda: products(options, limits))
    report.attempt("limits", "bandwidth", lambda: bandwidth(options, limits))
    if device.platform == "gpu":
        report.attempt("checks", "attention by cuDNN is as exact as written out", kernel)
    if not {"peak", "bandwidth"} <= limits.keys():
        table(report, limits)
        raise SystemExit("accelerator.py: the limits of the machine could not be measured")
    beside = start_checks(options, min(options.patience, report.left)) if "checks" in options.parts else None
    with tempfile.TemporaryDirectory() as folder:
        models, rounds = (MODELS, ROUNDS) if not options.tiny else tiny(Path(folder))
        subjects = {}
        for jobs_of_round in rounds:
            measure_round(report, options, jobs_of_round, models, subjects, bench.Limits(**limits), beside)
            beside = None
            table(report, limits)
    stats = device.memory_stats()
    if stats:
        report.add("memory", "peak of the whole run", gib=stats["peak_bytes_in_use"] / 2**30)
    table(report, limits)
    print((report.path.parent / "table.md").read_text(), flush=True)


def machine(device: Any, options: argparse.Namespace) -> dict[str, Any]:
    said = ""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        said = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    published = chip(device)
    limits = (
        f"{published.flops / 1e12:.0f} TFLOP/s, {published.bandwidth / 1e12:.2f} TB/s" if published else unknown(device)
    )
    return {
        "driver": said or "none", "jax": jax.__version__, "cores": os.cpu_count(),
        "flags": os.environ.get("XLA_FLAGS", ""), "published": limits,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"), "dtype": options.dtype,
    }  # fmt: skip


def products(options: argparse.Namespace, limits: dict[str, float]) -> dict[str, Any]:
    """Teraflops of products of several shapes."""
    found = {}
    for m, k, n in ((256, 256, 256),) if options.tiny else bench.products():
        rate = 2 * m * k * n / bench.product_time(m, k, n, options.dtype)
        found[f"{m}x{k}x{n}"] = rate / 1e12
        limits["peak"] = max(limits.get("peak", 0), rate)
    return found


def bandwidth(options: argparse.Namespace, limits: dict[str, float]) -> dict[str, Any]:
    """Terabytes a second of a copy, counting what is read and written."""
    x = jax.random.normal(jax.random.key(0), (2**20 if options.tiny else 2**30,), jnp.float32)
    limits["bandwidth"] = 2 * x.nbytes / bench._best_time(jax.jit(lambda x: x + 1), x, repeat=10)
    return {"copy": limits["bandwidth"] / 1e12}


def start_checks(options: argparse.Namespace, budget: float) -> tuple[subprocess.Popen, float]:
    """The checks as a process of their own, and when it has to be over."""
    command = [sys.executable, __file__, "--out", str(options.out), "--parts", "checks", "--budget", str(budget)]
    command += ["--parity", str(options.parity)] if options.parity else []
    command += ["--tiny"] if options.tiny else []
    flags = {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip(),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    return subprocess.Popen(command, env={**os.environ, **flags}), time.monotonic() + budget


def measure_round(report, options, jobs_of_round, models, subjects, limits, beside) -> None:
    """Compiles all programs of a round in threads, waits until nothing else runs, then measures one by one."""
    pool, weights = concurrent.futures.ThreadPoolExecutor(options.threads), {}
    for model in dict.fromkeys(job.model for job in jobs_of_round):
        try:
            subject = subjects[model] = subjects.get(model) or subject_of(models[model], options)
        except Exception as error:  # one failure must not cost the rest
            report.add("speed", model, error=f"{type(error).__name__}: {error}")
            continue
        weights[model] = pool.submit(lambda weights: weights.func.lower(*weights.args).compile(), subject.weights)
    jobs_of_round = [job for job in jobs_of_round if job.model in weights]
    futures = [pool.submit(compiled, job, subjects[job.model], options) for job in jobs_of_round]
    concurrent.futures.wait([*weights.values(), *futures], timeout=max(0.6 * report.left, 0))
    pool.shutdown(wait=False, cancel_futures=True)
    if beside:
        finish(report, *beside)
    for job in jobs_of_round:
        future, init = futures.pop(0), weights[job.model]
        if not (future.done() and init.done()) or future.cancelled() or init.cancelled():
            report.add(job.what, job.name, skipped="not compiled in time")
            continue

        def measure(job=job, future=future, init=init, subject=subjects[job.model]):
            figures = future.result().measure(init.result()(*subject.weights.args), lambda size, dtype: limits)
            running = sum(not other.done() for other in futures)
            return summary(job, figures, limits) | ({"still compiling": running} if running else {})

        report.attempt(job.what, job.name, measure)


def subject_of(model: tuple[str, tuple[str, ...]], options: argparse.Namespace) -> bench.Subject:
    config, overrides = model
    path = config if Path(config).is_absolute() else str(ROOT / config)
    experiment = parse(load_config(path), list(overrides), "accelerator.py", "")
    return bench.of_config(experiment, bench.Options("train", config, dtype=options.dtype))


def compiled(job: Job, subject: bench.Subject, options: argparse.Namespace) -> bench.Bench:
    make = {"train": bench.bench_train, "sample": bench.bench_sample}[job.what]
    return make(subject, bench.Options(job.what, job.model, job.batch, options.dtype, repeat=options.repeat))


def summary(job: Job, f: dict[str, Any], limits: bench.Limits) -> dict[str, Any]:
    """Figures of the median run."""
    published, stats = chip(jax.devices()[0]), jax.devices()[0].memory_stats()
    if job.what == "train":
        seconds, operations = float(np.median(f["step"])), f["operations"]
        found = {"step_ms": seconds * 1e3, "images_per_second": job.batch / seconds, "compile": f["compile"]}
    else:
        seconds, operations = float(np.median(f["loop"])), f["operations"][0]
        pixels = float(np.median(f["pixels"]))
        found = {
            "loop_ms": seconds * 1e3, "step_ms": seconds / f["steps"] * 1e3, "pixels_ms": pixels * 1e3,
            "images_per_second": job.batch / (seconds + pixels), "compile": sum(f["compile"]),
            "of_bandwidth": f["steps"] * f["read"] / limits.bandwidth / seconds,
        }  # fmt: skip
    rates = {"teraflops": operations / seconds / 1e12, "of_peak": operations / seconds / limits.peak}
    mfu = {"mfu": operations / seconds / published.flops} if published else {"mfu": unknown(jax.devices()[0])}
    memory = {"program_gb": f["memory"] / 1e9}
    if stats:
        memory["peak_gb_so_far"] = stats["peak_bytes_in_use"] / 1e9
    return found | rates | mfu | memory | {"spread": spread(f["step" if job.what == "train" else "loop"])}


def spread(seconds: list[float]) -> float:
    """How far the slowest run lies over the fastest."""
    return max(seconds) / min(seconds) - 1


def finish(report: Report, process: subprocess.Popen, until: float) -> None:
    """Waits for the checks, stops them when their time is over, and takes over what they found."""
    try:
        code = process.wait(max(until - time.monotonic(), 1))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        code = "stopped: its time was over"
    path = report.path.parent / "checks.json"
    found = json.loads(path.read_text()) if path.exists() else []
    report.entries += found
    report.add("checks", "process", ended=code, held=sum(entry.get("holds") is True for entry in found), of=len(found))


def table(report: Report, limits: dict[str, float]) -> None:
    """Writes `table.md`."""
    first = report.entries[0]
    lines = [
        f"{first['name']}, {first['driver']}, jax {first['jax']}, {first['date']}, flags {first['flags'] or 'none'}",
        "",
    ]
    if "peak" in limits and "bandwidth" in limits:
        lines += [f"Products {limits['peak'] / 1e12:.0f} TFLOP/s, copies {limits['bandwidth'] / 1e12:.2f} TB/s.", ""]
    columns = (
        "images/s",
        "step or token step",
        "pixels",
        "TFLOP/s",
        "of products",
        "MFU",
        "of bandwidth",
        "program's memory",
    )
    lines += ["| | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for entry in report.entries:
        if entry["part"] not in ("train", "sample"):
            continue
        if "teraflops" not in entry:
            lines.append(
                f"| {entry['name']} | {entry.get('error') or entry.get('skipped')} |" + " |" * (len(columns) - 1)
            )
            continue
        cells = (
            f"{entry['images_per_second']:.4g}", f"{entry['step_ms']:.3g} ms",
            f"{entry['pixels_ms']:.3g} ms" if "pixels_ms" in entry else "", f"{entry['teraflops']:.3g}",
            f"{entry['of_peak']:.1%}", f"{entry['mfu']:.1%}" if isinstance(entry["mfu"], float) else entry["mfu"],
            f"{entry['of_bandwidth']:.1%}" if "of_bandwidth" in entry else "", f"{entry['program_gb']:.2f} GB",
        )  # fmt: skip
        lines.append(f"| {entry['name']} | " + " | ".join(cells) + " |")
    lines += ["", "| check | holds | seconds |", "| --- | --- | --- |"]
    for entry in report.entries:
        if entry["part"] in ("checks", "parity") and entry["name"] != "process":
            said = entry.get("holds", entry.get("error", entry.get("skipped")))
            lines.append(f"| {entry['name']} | {str(said).splitlines()[0][:120]} | {entry.get('seconds', '')} |")
    (report.path.parent / "table.md").write_text("\n".join(lines) + "\n")


def tiny(folder: Path) -> tuple[dict[str, tuple[str, tuple[str, ...]]], tuple[tuple[Job, ...], ...]]:
    """A model that a CPU runs in seconds."""
    from test_train_sample import CONFIG

    (folder / "tiny.py").write_text(CONFIG)
    models = {"tiny": (str(folder / "tiny.py"), ()), "absent": (str(folder / "absent.py"), ())}
    return models, (jobs("tiny | train | 2", "absent | train | 2", "tiny | sample | 1"),)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # threads that still compile must not hold the machine
