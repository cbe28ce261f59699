"""Weights & Biases beside the run folder, for those who ask for it (`--log wandb`); the package is imported only then."""

import functools
import importlib.util
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PROJECT = "ar_jax"  # unless WANDB_PROJECT names another
FILE = "wandb_id.txt"  # in the folder of a stage, so that a resumed training goes on in the same place


def opener(name: str, settings: dict[str, Any]) -> Callable[[Path], "Wandb"]:
    """What opens a stage's run at Weights & Biases, given its folder.

    Args:
      name: of the run folder.
      settings: of the experiment, JSON-able.
    Raises:
      ValueError: the package is not installed.
    """
    if importlib.util.find_spec("wandb") is None:
        raise ValueError("log is wandb, but the package is not installed: pip install wandb, or leave --log out")
    return functools.partial(Wandb, name=name, settings=settings)


class Wandb:
    """A stage of a training, as one run of a group. WANDB_MODE, WANDB_PROJECT and its other variables hold."""

    def __init__(self, folder: Path, name: str, settings: dict[str, Any]):
        import wandb

        self._wandb, known = wandb, folder / FILE
        if not known.exists():
            known.write_text(uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), id=known.read_text().strip(), resume="allow",
            dir=str(folder) if isinstance(folder, Path) else None,
            name=f"{name}/{folder.name}", group=name, job_type=folder.name, config=settings,
        )  # fmt: skip
        self._run.define_metric("update")
        self._run.define_metric("*", step_metric="update")  # its own counter never goes back, a resumed training may

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self._run.log({**values, "update": step})

    def picture(self, step: int, image: np.ndarray) -> None:
        self._run.log({"samples": self._wandb.Image(np.ascontiguousarray(image)), "update": step})

    def close(self) -> None:
        self._run.finish()
