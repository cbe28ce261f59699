"""The training loop: it knows recipes, batches and checkpoints, and nothing of any method."""

import collections
import itertools
from collections.abc import Iterator
from pathlib import Path

import jax

from ar_jax.config import Stage
from ar_jax.distributed import say
from ar_jax.sharding import batch_sharding, put, put_batch, replicated, shard
from ar_jax.train.checkpoint import Checkpoints
from ar_jax.train.log import Log
from ar_jax.train.recipes import Recipe
from ar_jax.typing import Batch, PRNGKey


def fit(
    recipe: Recipe,
    stage: Stage,
    batches: Iterator[Batch],
    shown: Batch,
    folder: Path,
    mesh: jax.sharding.Mesh,
    key: PRNGKey,
) -> None:
    """Trains until `stage.steps`, from the newest checkpoint in `folder` if there is one.

    Args:
      recipe: the method.
      stage: length, log and checkpoint intervals.
      batches: iterator of this process's share of batches, with `get_state` and `set_state`.
      shown: held-out batch for pictures, all of it on every process.
      folder: of this stage.
      mesh: from `make_mesh`.
      key: of the whole stage; update i uses `fold_in(key, i)`, so a resumed run repeats nothing and skips nothing.
    """
    name, quiet = folder.name, jax.process_index() != 0
    init_key, key, shown_key = jax.random.split(key, 3)
    shapes = jax.eval_shape(recipe.init, init_key)
    layout = shard(shapes, mesh, recipe.rules)
    checkpoints = Checkpoints(folder / "checkpoints", stage.keep)
    first = checkpoints.latest or 0
    if first >= stage.steps:
        checkpoints.close()
        say(f"{name}: all {stage.steps} updates are done (checkpoint {first} in {folder})")
        return
    if first:
        state, meta = checkpoints.restore(shapes, layout)
        batches.set_state(meta["data"])
    else:
        state = jax.jit(recipe.init, out_shardings=layout)(init_key)

    frozen = put(recipe.frozen, replicated(mesh))
    update = jax.jit(recipe.update, donate_argnums=0, out_shardings=(layout, replicated(mesh)))
    preview = jax.jit(recipe.preview, out_shardings=replicated(mesh))
    images = len(next(iter(shown.values())))
    divisible = images % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
    shown = put(shown, batch_sharding(mesh) if divisible else replicated(mesh))
    log = Log(folder, name, first, stage.steps, quiet)
    if first:
        log.say(f"{name}: resumed at update {first}")
    advised, running = False, collections.deque()
    try:
        for step in itertools.count(first + 1):
            state, metrics = update(state, frozen, put_batch(next(batches), mesh), jax.random.fold_in(key, step))
            running.append(metrics)
            if len(running) > 2:  # let the host run ahead by two updates, not by hundreds
                jax.block_until_ready(running.popleft())
            log.step()
            last = step == stage.steps
            if step % stage.log_every == 0 or last:
                values = {name: float(value) for name, value in jax.device_get(metrics).items()}
                values = log.metrics(step, values | {"lr": float(recipe.lr(step - 1))}, stage.batch)
                warning = recipe.advice(values) if step > max(200, stage.log_every) and not advised else ""
                if warning:
                    advised = True
                    log.say(f"warning: {name}, update {step}: {warning}")
            if stage.preview_every and (step % stage.preview_every == 0 or last):
                params = state.params["model"] if state.ema is None else state.ema
                picture, values = jax.device_get(preview(params, frozen, shown, shown_key))
                if values:
                    log.metrics(step, {f"held_out/{name}": float(value) for name, value in values.items()})
                log.picture(step, picture, columns=10)
            if step % stage.save_every == 0 or last:
                checkpoints.save(state, {"data": batches.get_state()})
            if last:
                break
    finally:
        log.close()
        checkpoints.close()
