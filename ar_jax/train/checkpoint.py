"""Checkpoints of a training run: written in the background, complete or absent, restored onto any mesh."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from ar_jax.distributed import barrier
from ar_jax.train.state import TrainState
from ar_jax.typing import Params


class Checkpoints:
    """The checkpoints in one folder.

    Each holds "model" and, with averaging, "ema", so that a sampler reads no more than it needs, and "training", the
    rest of the state. Orbax writes under a temporary name and renames, so an interrupted save is never seen again.
    """

    def __init__(self, folder: Path, keep: int = 2):
        if jax.process_index() == 0:
            # Leftovers of interrupted saves. Orbax's own clean-up fails where threads of a failed save still write.
            for leftover in folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(leftover, ignore_errors=True)
        barrier("leftovers are gone")
        self._checkpointer = ocp.training.Checkpointer(
            folder.absolute(), preservation_policy=ocp.training.preservation_policies.LatestN(keep)
        )
        self._folder, self._pending, self._reported = folder, None, False

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Starts to write a state and small JSON-able facts; returns once the arrays are copied.

        Raises:
          ValueError: this save or the one before could not be written (disk full, for example).
        """
        self.wait()
        try:
            self._pending = self._checkpointer.save_checkpointables_async(
                int(state.step), _parts(state), custom_metadata=meta, force=True
            )
        except Exception as error:
            raise self._failed(error) from error

    def restore(self, like: TrainState, layout: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest state and its facts.

        Args:
          like: shapes, as `jax.eval_shape` gives them.
          layout: shardings of the same structure.

        Raises:
          ValueError: the checkpoint holds another model; its first differing leaf is named.
        """
        step = self.latest
        like = jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), like, layout)
        parts = _parts(like)
        metadata = self._checkpointer.checkpointables_metadata(step)
        for name, part in parts.items():
            check(part, metadata.metadata.get(name), f"checkpoint {self._folder / str(step)}, {name}")
        loaded = self._checkpointer.load_checkpointables(step, parts)
        rest = loaded["training"]
        params = {"model": loaded["model"], **rest["params"]}
        state = TrainState(rest["step"], params, loaded.get("ema"), rest["opt"], rest["extra"])
        return state, metadata.custom_metadata or {}

    def wait(self) -> None:
        """Waits for the save under way."""
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except Exception as error:
                raise self._failed(error) from error

    def close(self) -> None:
        try:
            self.wait()
        finally:
            # Orbax raises a failed save a second time, without a word of what to do
            with contextlib.suppress(*[Exception] * self._reported):
                self._checkpointer.close()

    def _failed(self, error):
        self._reported = True
        return ValueError(
            f"could not write a checkpoint to {self._folder}: {error}. Nothing half-written is kept; the newest complete "
            f"checkpoint is step {self.latest}. Free some space and run the same command again"
        )


def _parts(state: TrainState) -> dict[str, Any]:
    others = {name: tree for name, tree in state.params.items() if name != "model"}
    parts = {
        "model": state.params["model"],
        "training": {"step": state.step, "params": others, "opt": state.opt, "extra": state.extra},
    }
    return parts if state.ema is None else parts | {"ema": state.ema}


def latest_step(folder: Path) -> int | None:
    """The newest complete checkpoint in a folder of `Checkpoints`; leaves a run that is still writing alone."""
    if not folder.is_dir():
        return None
    checkpointer = ocp.training.Checkpointer(folder.absolute())
    latest = checkpointer.latest
    checkpointer.close()
    return None if latest is None else latest.step


def save_params(folder: Path, params: Params) -> None:
    """Writes one tree of parameters, complete or not at all."""
    ocp.save(folder.absolute(), params, overwrite=True)


def load_params(folder: Path, like: Params, part: str | None = None) -> Params:
    """Reads the parameters of a folder that `save_params` or `Checkpoints` wrote.

    Args:
      folder: of `save_params`, or of one step of `Checkpoints`.
      like: tree of shapes, with shardings if wanted.
      part: "model" or "ema" of a training checkpoint.
    Raises:
      ValueError: the folder holds other leaves than `like`; the first is named.
    """
    folder = folder.absolute()
    metadata = ocp.checkpointables_metadata(folder).metadata
    part = part or "state"
    check(like, metadata.get(part), f"checkpoint {folder}, {part}")
    local = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or local), like)
    return ocp.load_checkpointables(folder, {part: like})[part]


def check(like: Any, found: Any, where: str) -> None:
    """Raises a ValueError that names the first leaf in which a checkpoint's metadata differs from `like`."""
    if found is None:
        raise ValueError(f"{where}: not in the checkpoint")

    def flat(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): tuple(
                np.shape(leaf) if leaf.shape is None else leaf.shape
            )
            for path, leaf in leaves
            if hasattr(leaf, "shape")
        }

    want, have = flat(like), flat(found)
    for name in [*want, *have]:
        if name not in have:
            raise ValueError(
                f"{where}: leaf {name} of shape {want[name]} is missing; the config and the checkpoint differ"
            )
        if name not in want:
            raise ValueError(f"{where}: leaf {name} of shape {have[name]} is not part of the configured model")
        if want[name] != have[name]:
            raise ValueError(
                f"{where}: leaf {name} has shape {have[name]}, but the configured model needs {want[name]}"
            )
