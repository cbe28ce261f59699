"""The training loop: it knows recipes, batches and checkpoints, and nothing of any method."""

import collections
import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from ar_jax.config import Stage
from ar_jax.machine.distributed import say
from ar_jax.machine.sharding import batch_sharding, padded, put, put_batch, replicated, shard
from ar_jax.train.checkpoint import Checkpoints
from ar_jax.train.guards import Health, Notice, Profile, Stopped, Watchdog
from ar_jax.train.log import Board, Log
from ar_jax.train.recipes import Recipe
from ar_jax.train.state import TrainState
from ar_jax.typing import Batch, Params, PRNGKey


def fit(
    recipe: Recipe,
    stage: Stage,
    batches: Iterator[Batch],
    shown: Batch,
    folder: Path,
    mesh: jax.sharding.Mesh,
    key: PRNGKey,
    start: Callable[[Params], Params] | None = None,
    evaluate: Callable[[Params], dict[str, float]] | None = None,
    shown_are: str = "held_out",
    beside: Callable[[Path], Board] | None = None,
) -> None:
    """Trains until `stage.steps`, from the newest checkpoint in `folder` if there is one.

    Args:
      recipe: the method.
      stage: length, log and checkpoint intervals.
      batches: iterator of this process's share of batches, with `get_state` and `set_state`.
      shown: batch for pictures, all of it on every process.
      folder: of this stage.
      mesh: from `make_mesh`.
      key: of the whole stage; update i uses `fold_in(key, i)`, so a resumed run repeats nothing and skips nothing.
      start: see `initial`; asked if there is no checkpoint.
      evaluate: parameters of the model -> further figures, measured every `stage.evaluate_every` updates.
      shown_are: "held_out" or "train_sample"; what the names of the figures begin with.
      beside: opens what figures and pictures are told beside the folder (see `Log`).

    Raises:
      Stopped: told to (see `Notice`); a checkpoint of the last update is written.
      ValueError: settings that do not go together, a checkpoint of another model, or too many updates in a row without
        finite numbers.
    """
    name, quiet = folder.name, jax.process_index() != 0
    init_key, key, shown_key = jax.random.split(key, 3)
    shapes = jax.eval_shape(recipe.init, init_key)
    layout = shard(shapes, mesh, recipe.rules)
    images, shown = len(next(iter(shown.values()))), padded(shown, mesh)
    rows = len(next(iter(shown.values())))
    shown = put(shown, batch_sharding(mesh))
    if stage.keep_best:
        _, figures = jax.eval_shape(recipe.preview, shapes.params["model"], recipe.frozen, shown, shown_key)
        _check_best(stage, name, [*figures, *["fd"] * (evaluate is not None)])
    checkpoints = Checkpoints(folder / "checkpoints", stage.keep, stage.keep_every, stage.keep_best, stage.best)
    first = checkpoints.latest or 0
    if first >= stage.steps:
        checkpoints.close()
        say(f"{name}: all {stage.steps} updates are done (checkpoint {first} in {folder})")
        return
    if first:
        state, facts = checkpoints.restore(shapes, layout)
        batches.set_state(facts["data"])
    else:
        state = initial(recipe, shapes, layout, init_key, start, stage.alike)

    def advance(state, frozen, batch, key):
        # Key and learning rate follow from the state: nothing but the batch comes from the host.
        lr = jnp.asarray(recipe.lr(state.step - state.skipped), jnp.float32)
        state, metrics = recipe.update(state, frozen, batch, jax.random.fold_in(key, state.step + 1))
        return state, metrics | {"lr": lr}

    frozen = put(recipe.frozen, replicated(mesh))
    key, shown_key = jax.jit(lambda keys: keys, out_shardings=replicated(mesh))((key, shown_key))
    update = jax.jit(advance, donate_argnums=0, out_shardings=(layout, replicated(mesh)))
    preview = jax.jit(recipe.preview, out_shardings=replicated(mesh))
    log = Log(folder, name, first, stage.steps, mesh.size, quiet, beside)
    if first:
        log.say(f"{name}: resumed at update {first}")
    health, advised, running = Health(stage.guards), False, collections.deque()

    def settle(left: int) -> None:
        """Looks at the metrics of all but the last `left` updates, and waits for them."""
        nonlocal advised
        while len(running) > left:
            step, metrics = running.popleft()
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            message, figures = health.check(step, values)
            if message:
                log.metrics(step, figures)
                log.say(f"{name}, update {step}: {message}")
            if step % stage.log_every == 0 or step == stage.steps:
                log.metrics(step, values | log.pace(step, stage.batch))
                warning = recipe.advice(values) if step > max(200, stage.log_every) and not advised else ""
                if warning:
                    advised = True
                    log.say(f"warning: {name}, update {step}: {warning}")

    with (
        Notice() as notice,  # outermost: a second signal must not end the last save
        contextlib.closing(checkpoints),
        contextlib.closing(log),
        Watchdog(stage.guards.hang) as watchdog,
        Profile(folder / "profile", 0 if quiet else stage.profile) as profile,
        jax.transfer_guard("disallow"),
    ):
        for step in itertools.count(first + 1):
            with log.spending("input"):
                batch = put_batch(next(batches), mesh)
            log.flops = log.flops or recipe.flops(state, frozen, batch, key)
            state, metrics = update(state, frozen, batch, key)
            running.append((step, metrics))
            settle(2)  # let the host run ahead by two updates, not by hundreds
            log.step()
            profile.updated(metrics)
            watchdog.alive()
            last, stop, figures = step == stage.steps, notice.received(step), {}
            if stage.preview_every and (step % stage.preview_every == 0 or last) and not stop:
                settle(0)
                with log.spending("aside"):
                    params = state.params["model"] if state.ema is None else state.ema
                    picture, figures = jax.device_get(preview(params, frozen, shown, shown_key))
                    figures = {name: float(value) for name, value in figures.items()}
                    log.metrics(step, {f"{shown_are}/{name}": value for name, value in figures.items()})
                    log.picture(step, picture[: len(picture) * images // rows], columns=10)
                watchdog.alive()
            if evaluate and (step % stage.evaluate_every == 0 or last) and not stop:
                settle(0)
                with log.spending("aside"), jax.transfer_guard("allow"):
                    found = evaluate(state.params["model"] if state.ema is None else state.ema)
                    log.metrics(step, {f"evaluation/{name}": value for name, value in found.items()})
                    figures |= found
                watchdog.alive()
            if step % stage.save_every == 0 or last or stop:
                settle(0)
                with log.spending("aside"), jax.transfer_guard("allow"):  # orbax copies arrays in its own ways
                    checkpoints.save(state, {"data": batches.get_state()}, figures)
                    log.saved()
            if stop:
                raise Stopped(f"{name}: told to stop, saved update {step}; the same command goes on from there", notice.code)
            if last:
                break


def initial(
    recipe: Recipe,
    shapes: TrainState,
    layout: TrainState,
    key: PRNGKey,
    start: Callable[[Params], Params] | None = None,
    alike: Sequence[tuple[str, str]] = (),
) -> TrainState:
    """The state before the first update; parameters that are given are handed over to it, so memory holds them once.

    Args:
      recipe: the method.
      shapes, layout: of its state.
      key: for what is drawn.
      start: shapes of the model's parameters, with shardings -> the same tree with arrays where it has them.
      alike: pairs of parts of the model, of which the first begins as the second (see `partners`), of more layers the last ones.
    """
    if start is None:
        return jax.jit(recipe.init, out_shardings=layout)(key)
    like = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes.params["model"], layout.params["model"]
    )  # fmt: skip
    given = {name: leaf for name, leaf in flatten_dict(start(like)).items() if isinstance(leaf, jax.Array)}

    def begin(key, given):
        state = recipe.init(key)
        model = unflatten_dict(flatten_dict(state.params["model"]) | given)
        for part, other in alike:
            flat = flatten_dict(model, sep="/")
            last = {name: x[x.shape[0] - flat[name].shape[0] :] if x.ndim else x
                    for name, x in partners(model, part, other).items()}  # fmt: skip
            model = unflatten_dict(flat | last, sep="/")
        average = None if state.ema is None else jax.tree.map(jnp.copy, model)
        return state.replace(params=state.params | {"model": model}, ema=average)

    return jax.jit(begin, out_shardings=layout, donate_argnums=1)(key, given)


def partners(model: Params, part: str, other: str) -> dict[str, Any]:
    """What the leaves of a part of the model, by path, begin as: those of an equal part, or of a stack of more such layers.

    Args:
      model: of arrays, or of their shapes.
      part, other: paths, "head" or "head/readout".
    Raises:
      ValueError: there are no such parts, or they are not equal.
    """
    flat = flatten_dict(model, sep="/")
    found = {name: flat.get(other + name.removeprefix(part)) for name in flat if f"{name}/".startswith(f"{part}/")}
    pairs = [(flat[name].shape, x.shape if x is not None else None) for name, x in found.items()]
    layers = {(own[:1], its[:1]) if own and its and own[1:] == its[1:] else None for own, its in pairs}
    deeper = part not in found and len(layers) == 1 and None not in layers and all(own[0] < its[0] for own, its in pairs)
    if not found or not (deeper or all(own == its for own, its in pairs)):
        raise ValueError(f"alike has {(part, other)}, which are no two equal parts; it has {tuple(model)}")
    return found


def _check_best(stage, name, figures):
    if stage.best not in figures:
        raise ValueError(f"{name}.best is {stage.best!r}, but the held-out figures are {figures}; choose one of them")
    source = "evaluate_every" if stage.best == "fd" else "preview_every"
    every = getattr(stage, source)
    if not every or stage.save_every % every:
        raise ValueError(
            f"{name}.keep_best is {stage.keep_best}, but not every checkpoint would have held-out figures: save_every is "
            f"{stage.save_every} and {source} {every}; make save_every a multiple of {source}"
        )
