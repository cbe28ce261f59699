"""What a run tells: a progress bar, a JSON line and TensorBoard scalars per period, pictures."""

import json
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ar_jax.images import save_png, tile


class Log:
    """Writes to `metrics.jsonl`, TensorBoard events and PNG files in one folder, and shows a progress bar.

    Only the process with `quiet=False` writes.
    """

    def __init__(self, folder: Path, name: str, first: int, steps: int, quiet: bool = False):
        self._folder, self._quiet = folder, quiet
        self._bar = tqdm(total=steps, initial=first, desc=name, unit="step", disable=quiet, dynamic_ncols=True)
        if not quiet:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115
            self._board = _summary_writer()(str(folder))
        self._since, self._seen = time.perf_counter(), first

    def step(self) -> None:
        self._bar.update()

    def metrics(self, step: int, values: dict[str, float], batch: int = 0) -> dict[str, float]:
        """Writes figures of a finished update; with `batch`, also the pace since the last such call."""
        if batch:
            now = time.perf_counter()
            pace = (step - self._seen) / (now - self._since)
            self._since, self._seen = now, step
            values = values | {"steps_per_second": pace, "images_per_second": pace * batch}
        if not self._quiet:
            self._file.write(json.dumps({"step": step, **{k: round(v, 6) for k, v in values.items()}}) + "\n")
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            shown = {k: f"{v:.4g}" for k, v in values.items() if k in ("loss", "psnr", "usage", "images_per_second")}
            self._bar.set_postfix(shown)
        return values

    def picture(self, step: int, images: np.ndarray, columns: int) -> None:
        """Writes `samples/STEP.png`, a grid of uint8 [m h w c] images."""
        if not self._quiet:
            sheet = tile(images, columns)
            save_png(self._folder / "samples" / f"{step:07d}.png", np.broadcast_to(sheet, (*sheet.shape[:2], 3)))
            self._board.add_image("samples", sheet, step, dataformats="HWC")

    def say(self, message: str) -> None:
        if not self._quiet:
            self._bar.write(message)

    def close(self) -> None:
        self._bar.close()
        if not self._quiet:
            self._file.close()
            self._board.close()


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
