"""What a run tells: a progress bar, a JSON line and TensorBoard scalars per period, pictures."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
from tqdm import tqdm

from ar_jax.files.images import save_png, tile
from ar_jax.machine.chips import peak_flops, unknown

SHOWN = ("loss", "psnr", "usage", "images_per_second", "mfu", "input_wait", "memory_gib")  # beside the progress bar


class Board(Protocol):
    """What figures and pictures are told beside the run folder."""

    def metrics(self, step: int, values: dict[str, float]) -> None: ...

    def picture(self, step: int, image: np.ndarray) -> None: ...

    def close(self) -> None: ...


class Log:
    """Writes to `metrics.jsonl`, `messages.jsonl`, TensorBoard events and PNG files in one folder, and shows a progress bar.

    Only the process with `quiet=False` writes.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        first: int,
        steps: int,
        chips: int = 1,
        quiet: bool = False,
        beside: Callable[[Path], Board] | None = None,
    ):
        """Opens the files of a stage.

        Args:
          folder: of the stage.
          name: beside the progress bar.
          first: the update that the training goes on from.
          steps: updates in all.
          chips: over which the speed is divided.
          quiet: nothing is written.
          beside: opens what else figures and pictures are told.
        """
        self.flops = 0.0  # of an update
        self._folder, self._chips, self._quiet = folder, chips, quiet
        self._bar = tqdm(total=steps, initial=first, desc=name, unit="step", disable=quiet, dynamic_ncols=True)
        if not quiet:
            folder.mkdir(parents=True, exist_ok=True)
            resumed = _cut(folder / "metrics.jsonl", first)
            self._file = open(folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115
            self._board = _summary_writer()(str(folder), purge_step=first + 1 if resumed else None)
            self._beside = [beside(folder)] if beside else []
        self._since, self._seen, self._spent = time.perf_counter(), first, {"input": 0.0, "aside": 0.0}
        self._shown = {}
        device = jax.local_devices()[0]
        if device.platform != "cpu" and not peak_flops(device):
            self.say(f"{name}: {unknown(device)}, so mfu is not logged")

    def step(self) -> None:
        self._bar.update()

    @contextlib.contextmanager
    def spending(self, on: str) -> Iterator[None]:
        """Marks time spent on "input", or "aside": previews and saves, which do not count in the pace."""
        began = time.perf_counter()
        yield
        self._spent[on] += time.perf_counter() - began

    def pace(self, step: int, batch: int) -> dict[str, float]:
        """Since the last call: speed (MFU is the share of the bfloat16 peak), the share of the time spent waiting for
        input; memory of the fullest device."""
        now = time.perf_counter()
        seconds = now - self._since - self._spent["aside"]
        speed = (step - self._seen) / seconds
        figures = {
            "steps_per_second": speed, "seconds_per_step": 1 / speed, "images_per_second": speed * batch,
            "images_per_second_per_chip": speed * batch / self._chips, "input_wait": self._spent["input"] / seconds,
            "teraflops_per_chip": speed * self.flops / self._chips / 1e12,
        }  # fmt: skip
        if peak := peak_flops(jax.local_devices()[0]):
            figures["mfu"] = speed * self.flops / self._chips / peak
        if stats := [stats for device in jax.local_devices() if (stats := device.memory_stats())]:  # not on CPU
            figures["memory_gib"] = max(s["bytes_in_use"] for s in stats) / 2**30
            figures["memory_peak_gib"] = max(s["peak_bytes_in_use"] for s in stats) / 2**30
        self._since, self._seen, self._spent = now, step, {"input": 0.0, "aside": 0.0}
        return figures

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Writes figures of an update, to six digits; JSON has no NaN and no infinity, so `metrics.jsonl` has null."""
        if not self._quiet:
            written = {name: float(f"{value:.6g}") if math.isfinite(value) else None for name, value in values.items()}
            self._file.write(json.dumps({"step": step, **written}) + "\n")
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            for board in self._beside:
                board.metrics(step, {name: value for name, value in written.items() if value is not None})
            self._shown |= {name: f"{values[name]:.4g}" for name in SHOWN if name in values}
            self._bar.set_postfix(self._shown)

    def picture(self, step: int, images: np.ndarray, columns: int) -> None:
        """Writes `samples/STEP.png`, a grid of uint8 [m h w c] images."""
        if not self._quiet:
            sheet = tile(images, columns)
            save_png(self._folder / "samples" / f"{step:07d}.png", np.broadcast_to(sheet, (*sheet.shape[:2], 3)))
            self._board.add_image("samples", sheet, step, dataformats="HWC")
            for board in self._beside:
                board.picture(step, np.broadcast_to(sheet, (*sheet.shape[:2], 3)))

    def say(self, message: str) -> None:
        if not self._quiet:
            self._bar.write(message)
            line = {"time": round(time.time()), "step": self._bar.n, "message": message}
            with open(self._folder / "messages.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        self._bar.close()
        if not self._quiet:
            self._file.close()
            self._board.close()
            for board in self._beside:
                board.close()


def _cut(file: Path, last: int) -> bool:
    """Leaves out what a log says of updates after the last one that counts, which a resumed training makes again.

    Half a line, which a killed process leaves, is left out too. Returns whether there was a log.
    """
    if not file.exists():
        return False
    kept = []
    for line in file.read_text(errors="replace").splitlines(keepends=True):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            if line.endswith("\n") and json.loads(line)["step"] <= last:
                kept.append(line)
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        temporary.write_text("".join(kept))
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _summary_writer():
    """tensorboardX's class, without the torch that it would import wherever it finds one."""
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hide:
            del sys.modules["torch"]
    return SummaryWriter
