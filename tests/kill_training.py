"""Kills training at random moments, runs the command again until it ends, and compares the result bit for bit.

    python tests/kill_training.py [--kills 20] [--seed 0] [--out FOLDER] [--data webdataset]

One run of train.py is left alone. The same command is then killed (SIGKILL) at random moments of both stages, in turn
while it trains and while it starts; each third update is saved, so that many kills fall into a save. After every kill
the checkpoint that would be resumed from is read in full. At the end every array of both runs' last checkpoints
(parameters, average, optimiser, statistics) must have the same bytes. Takes about ten seconds a kill on two CPU cores;
exits with 1 if anything differs.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from data.packing import pack
from orbax.checkpoint import v1 as ocp

from ar_jax.data import Data, open_source
from ar_jax.files.places import absolute
from ar_jax.train.checkpoint import latest_step

ROOT = Path(__file__).parents[1]
STAGES = ("tokenizer", "generator")
CONFIG = """
from ar_jax.config import Experiment, GeneratorStage, Losses, TokenizerStage
from ar_jax.data import Data
from ar_jax.generators.causal import Causal
from ar_jax.nets.conditioning import Label
from ar_jax.nets.patchgan import PatchGan
from ar_jax.nets.transformer import Transformer
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.train.optim import Optim


def get_config():
    often = dict(batch=8, log_every=1, preview_every=0, preview_images=4, save_every=3)
    return Experiment(
        name="killed",
        data=Data(name="mnist5k", size=32, crop="random", flip=True),
        tokenizer=TokenizerStage(
            module=VQGAN((32, 32), features=4, mult=(1, 1, 2), res_blocks=0, latent=4, codes=16, code_features=4, groups=2),
            losses=Losses(lpips=0.0, adversarial=0.5, adversarial_start=10, judge=PatchGan(4, 1), reset_after=5),
            optim=Optim(lr=1e-3, warmup=10, ema=0.9), **often,
        ),
        generator=GeneratorStage(
            module=Causal(Transformer(2, 16, 2, hidden=24, dropout=0.1), Label(16), dropout=0.1),
            optim=Optim(lr=1e-2, warmup=10, ema=0.9), **often,
        ),
    )
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--data", default="", help="image_folder, webdataset, huggingface or parquet: the digits packed so")
    parser.add_argument("--out", type=Path, help="folder for both runs; a temporary one if left out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        figures = kill_and_compare(options.out or Path(temporary), options.kills, options.seed, print, options.data)
    print(*(f"{name:24} {value}" for name, value in figures.items()), sep="\n")
    raise SystemExit(int(figures["different"] > 0 or figures["unreadable"] > 0))


def kill_and_compare(place: Path, kills: int, seed: int = 0, say=lambda text: None, data: str = "") -> dict[str, float]:
    """Runs training with and without kills in a folder; returns what happened, in numbers."""
    began, chance = time.monotonic(), random.Random(seed)
    place.mkdir(parents=True, exist_ok=True)
    text = CONFIG
    if data:
        text = CONFIG.replace('name="mnist5k",', f'name="{data}", path="{packed(place, data)}",')
    (place / "config.py").write_text(text)
    updates = {"tokenizer": 6 + kills, "generator": 6 + 5 * kills}  # together more than the kills can reach
    between = left_alone(place, updates)
    say(f"left alone: a save every {between:.2f} s")

    killed, start_up = place / "killed", 0.0
    figures = {"kills": kills, "while starting": 0, "while saving": 0, "unreadable": 0, "updates done twice": 0}
    for kill in range(kills):
        launched, process, saved = time.time(), train(place, "killed", updates), progress(killed)
        if kill % 2:
            time.sleep(chance.uniform(0, start_up))
        else:  # while it trains: after one to three saves
            for i in range(chance.randint(1, 3)):
                before = progress(killed)
                while progress(killed) == before and process.poll() is None:
                    time.sleep(0.002)
                if i == 0:
                    start_up = time.time() - launched
            time.sleep(chance.uniform(0, between))
        if process.poll() is not None:
            raise RuntimeError(f"training ended by itself before kill {kill + 1}, with code {process.returncode}")
        process.send_signal(signal.SIGKILL)
        process.wait()
        figures["while starting"] += progress(killed) == saved
        unfinished = [path for stage in STAGES for path in (killed / stage).glob("checkpoints/*.orbax-checkpoint-tmp*")]
        saving = any(path.stat().st_mtime > launched for path in unfinished)
        figures["while saving"] += saving
        done = {stage: latest_step(killed / stage / "checkpoints") for stage in STAGES}
        figures["unreadable"] += sum(not arrays(killed, stage) for stage, step in done.items() if step)
        say(f"kill {kill + 1}: at {progress(killed)}{', in a save' * saving}; complete: {done}")
    code = train(place, "killed", updates).wait()
    if code:
        raise RuntimeError(f"the last run ended with code {code}; see {place / 'killed.log'}")

    compared = different = 0
    for stage in STAGES:
        a, b = arrays(place / "whole", stage), arrays(killed, stage)
        names = a.keys() | b.keys()
        compared += len(names)
        different += sum(a.get(name) != b.get(name) for name in names)
        lines = [json.loads(line) for line in (killed / stage / "metrics.jsonl").read_text().splitlines()]
        figures["updates done twice"] += len(lines) - len({line["step"] for line in lines})
    log = (place / "killed.log").read_text()
    figures |= {
        "resumed": log.count("resumed at update"), "set aside": log.count("is broken"),
        "arrays compared": compared, "different": different, "seconds": round(time.monotonic() - began),
    }  # fmt: skip
    return figures


def packed(place: Path, kind: str) -> Path:
    """All training digits, by class, in the form that `data.name` reads."""
    source = open_source(Data(name="mnist5k"))
    order = sorted(range(len(source)), key=lambda i: source.labels[i])
    images, labels = zip(*((source[i]["image"], source[i]["label"]) for i in order))
    return pack(place, kind, images, labels, source.info.class_names, shards=8)


def train(place: Path, name: str, updates: dict[str, int]) -> subprocess.Popen:
    """Starts train.py on one CPU device; no program is compiled twice."""
    environment = {"JAX_COMPILATION_CACHE_DIR": str(place / "compiled")} | os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }  # fmt: skip
    steps = [word for stage in STAGES for word in (f"--{stage}.steps", str(updates[stage]))]
    command = [sys.executable, ROOT / "train.py", place / "config.py", "--out", place, "--name", name, *steps]
    with open(place / f"{name}.log", "a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def left_alone(place: Path, updates: dict[str, int]) -> float:
    """Trains to the end; usual seconds from one save to the next."""
    times, before, process = [], "", train(place, "whole", updates)
    while process.poll() is None:
        if (now := progress(place / "whole")) != before:
            times, before = [*times, time.monotonic()], now
        time.sleep(0.002)
    if process.returncode:
        raise RuntimeError(f"training ended with code {process.returncode}; see {place / 'whole.log'}")
    return float(np.median(np.diff(times)))


def progress(folder: Path) -> str:
    """The newest checkpoint that has its name, as "stage step"; "" before the first."""
    for stage in reversed(STAGES):
        steps = [int(path.name) for path in (folder / stage).glob("checkpoints/*") if path.name.isdecimal()]
        if steps:
            return f"{stage} {max(steps)}"
    return ""


def arrays(run_folder: Path, stage: str) -> dict[str, tuple]:
    """Type, shape and bytes of everything in the newest complete checkpoint of a stage, by path."""
    folder = run_folder / stage / "checkpoints"
    folder = absolute(folder / str(latest_step(folder)))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])  # it may have been saved by other processes
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), ocp.checkpointables_metadata(folder).metadata
    )
    state = ocp.load_checkpointables(folder, like)
    leaves = {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}
    return {name: (str(x.dtype), x.shape, x.tobytes()) for name, x in leaves.items()}


if __name__ == "__main__":
    main()
