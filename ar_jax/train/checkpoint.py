"""Checkpoints of a training run: written in the background, complete or absent, restored onto any mesh."""

import concurrent.futures
import contextlib
import functools
import json
import logging
import math
import os
import re
import sys
import threading
import zlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp

from ar_jax.files import words
from ar_jax.files.codec import read_json
from ar_jax.files.places import absolute, remove_tree, rename_tree, sizes
from ar_jax.machine.distributed import agreed, barrier, seen
from ar_jax.train.state import TrainState
from ar_jax.typing import Params

COMMITTED = "commit_success.txt"  # Orbax's, of what is whole: in a bucket everything has its final name from the start
CONTENTS = "contents.json"  # in a checkpoint: size and checksum of its files, and the facts saved with the arrays
SUMMED = 2**26  # bytes; larger files are compared by size only: a save in the last minute must not be read again
FALLING = ("loss", "fd")  # held-out figures of which a smaller one is better


# What fails in orbax's threads is raised again where a save is waited for; its logs have a traceback for each of them
logging.getLogger("absl").addFilter(lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname)


class Checkpoints:
    """The checkpoints of a running training, in one folder.

    Each holds "model" and, with averaging, "ema", so that a sampler reads no more than it needs, and "training", the
    rest of the state. Orbax writes under a temporary name and renames, or in a bucket writes a last file that says so, and an
    interrupted save is never seen again. A list of the files is part of each, so that one which was damaged later is not taken for whole: those at the end of
    the run are set aside as STEP.broken when this opens the folder.

    Args:
      folder: of this run only; made if need be.
      keep: newest checkpoints kept.
      keep_every: those of multiples of so many updates are kept too; 0 keeps none.
      keep_best: so many of the best are kept too.
      best: the held-out figure that decides which are best.
    Raises:
      ValueError: a number out of range, or checkpoints of which none is whole.
    """

    def __init__(self, folder: Path, keep: int = 2, keep_every: int = 0, keep_best: int = 0, best: str = "loss"):
        if keep < 1 or keep_every < 0 or keep_best < 0:
            raise ValueError(
                f"keep is {keep}, keep_every {keep_every} and keep_best {keep_best}; keep must be at least 1 and the "
                "others at least 0"
            )
        self._folder, broken = folder, {}
        first = jax.process_index() == 0  # the others may see less of the folder, and go by what it finds
        if first and _newest_whole(folder, broken.__setitem__) is None and broken:
            path, found = next(iter(broken.items()))
            raise ValueError(
                f"no checkpoint in {folder} is whole; the newest, {path.name}, is broken ({found}). Bring one of them back, "
                "or remove them to begin anew"
            )
        if first:
            # Leftovers of interrupted saves. Orbax's own clean-up fails where threads of a failed save still write.
            for leftover in _unfinished(folder):
                remove_tree(leftover, ignore_errors=True)
            for path, found in broken.items():
                _set_aside(path, found)
        barrier("broken checkpoints are set aside")
        self._figures = {step: found for step in _steps(folder) if (found := _figures(folder / str(step)))}
        policies = ocp.training.preservation_policies
        kept = [policies.LatestN(keep), _Best(keep_best, best, self._figures)]
        if keep_every:
            kept.append(policies.EveryNSteps(keep_every))
        context = _writing(folder)
        # a lambda: orbax copies its options deeply, and would copy the object of a bound method with them
        context.asynchronous.post_finalization_callback = lambda: self._list_contents()
        self._checkpointer = ocp.training.Checkpointer(
            _for_orbax(folder), context=context, preservation_policy=policies.AnyPreservationPolicy(kept)
        )
        self._best, self._pending, self._reported = best, None, False

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint that process 0 sees; to be asked by all processes together."""
        return int(agreed(np.int32(latest_step(self._folder) or 0))) or None

    def save(self, state: TrainState, facts: dict[str, Any], figures: dict[str, float] | None = None) -> None:
        """Starts to write a state; returns once the arrays are copied.

        Args:
          state: over all processes.
          facts: small and JSON-able; they come back with the state.
          figures: of held-out images, if they were measured at this step.
        Raises:
          ValueError: this save or the one before could not be written (disk full, for example).
        """
        self.wait()
        step = int(state.step)
        self._figures[step] = figures or {}
        self._saving = (step, {"facts": facts, "figures": self._figures[step], "best": self._best})
        try:
            self._pending = self._checkpointer.save_checkpointables_async(step, _parts(state), force=True)
        except Exception as error:
            raise self._failed(error) from error

    def restore(self, like: TrainState, layout: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest state and its facts.

        Args:
          like: shapes, as `jax.eval_shape` gives them.
          layout: shardings of the same structure.

        Raises:
          ValueError: the checkpoint holds another model (its first differing leaf is named), or cannot be read.
        """
        step = self.latest
        folder = self._folder / str(step)
        seen([folder / CONTENTS])
        like = jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), like, layout)
        parts = _parts(like)
        metadata = self._checkpointer.checkpointables_metadata(step).metadata
        unused = _moments_of_frozen(parts["training"], metadata.get("training"))
        for name, part in parts.items():
            check(part, metadata.get(name), f"checkpoint {folder}, {name}", unused)
        try:
            if unused:
                with _partial():
                    loaded = ocp.load_checkpointables(_for_orbax(folder), parts)
            else:
                loaded = self._checkpointer.load_checkpointables(step, parts)
        except Exception as error:
            raise ValueError(
                f"checkpoint {folder} has all its files but cannot be read: {error}. If it is damaged, rename it to "
                f"{step}.broken and run the same command again to go on from the one before"
            ) from error
        rest = loaded["training"]
        rest["params"]["model"] = loaded["model"]
        return TrainState(ema=loaded.get("ema"), **rest), _contents(folder)["facts"]

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

    def _list_contents(self):
        """Orbax calls this on the first process when every file is written, before the checkpoint gets its name."""
        step, contents = self._saving
        (folder,) = (path for path in _unfinished(self._folder) if path.name.split(".")[0] == str(step))
        # Orbax still adds the time of the commit to its metadata, which nothing is read from.
        _list_files(folder, "_CHECKPOINT_METADATA", contents, SUMMED if isinstance(folder, Path) else 0)

    def _failed(self, error):
        self._reported = True
        threading._register_atexit(_say_no_more)  # what `atexit` calls comes after threads have ended
        step = latest_step(self._folder)
        return ValueError(
            f"could not write a checkpoint to {self._folder}: {error}. Nothing half-written is kept; "
            + (f"the newest complete checkpoint is step {step}" if step else "there is no complete checkpoint yet")
            + ". Free some space and run the same command again"
        )


def _say_no_more():
    """While the process ends: every write that tensorstore still ends would print that its event loop is closed."""
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


class _Best:
    """Keeps the best of the checkpoints that have a figure. Orbax's BestN fails where its file of figures is damaged."""

    def __init__(self, count: int, name: str, figures: dict[int, dict[str, float]]):
        self.count, self.name, self.figures = count, name, figures

    def should_preserve(self, checkpoints, *, context):
        having = [c.step for c in checkpoints if self.name in self.figures.get(c.step, {})]
        best = sorted(having, key=lambda step: _score(self.figures[step], self.name), reverse=True)[: self.count]
        return [c.step in best for c in checkpoints]


def _parts(state: TrainState) -> dict[str, Any]:
    rest = {name: getattr(state, name) for name in ("step", "opt", "extra", "skipped", "skipped_in_a_row")}
    others = {name: tree for name, tree in state.params.items() if name != "model"}
    parts = {"model": state.params["model"], "training": rest | {"params": others}}
    return parts if state.ema is None else parts | {"ema": state.ema}


def latest_step(folder: Path) -> int | None:
    """The newest complete checkpoint in a folder of `Checkpoints`; reads only, so a running training may go on."""
    return _newest_whole(folder, lambda path, damage: print(f"checkpoint {path} is broken ({damage}): not used"))


def newest(folder: Path) -> int:
    """The newest step in a folder of `Checkpoints`, whole or not; 0 without any."""
    return max(_steps(folder), default=0)


def find_step(folder: Path, which: str = "newest") -> int:
    """The step of a checkpoint.

    Args:
      folder: of `Checkpoints`.
      which: "newest", "best" (by the figure the training was told to judge by), or a step.
    Raises:
      ValueError: there is no such checkpoint.
    """
    if which == "newest":
        step = latest_step(folder)
        if step is None:
            raise ValueError(f"{folder.parent} has no complete checkpoint yet")
        return step
    whole = [step for step in _steps(folder) if not damage(folder / str(step))]
    if which == "best":
        figures = {step: found for step in whole if (found := _figures(folder / str(step)))}
        if not figures:
            raise ValueError(
                f"no checkpoint in {folder} has held-out figures; train with keep_best, or give a step of {whole}"
            )
        name = _contents(folder / str(max(figures)))["best"]
        return max(figures, key=lambda step: (_score(figures[step], name), step))
    if not which.isdecimal() or int(which) not in whole:
        raise ValueError(
            f"checkpoint is {which!r}; it must be newest, best or one of the complete steps {whole} in {folder}"
        )
    return int(which)


def _score(figures: dict[str, float], name: str) -> float:
    """Higher is better; a figure that is missing or not finite is the worst."""
    value = figures.get(name, math.nan)
    return (-value if name in FALLING else value) if math.isfinite(value) else -math.inf


def _steps(folder):
    """Steps of the checkpoints that were saved to the end, whole or not, ascending."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal() and is_there(path))


def is_there(folder: Path) -> bool:
    """Whether a checkpoint or a folder of parameters was written to the end."""
    return folder.exists() if isinstance(folder, Path) else (folder / COMMITTED).exists()


def _unfinished(folder):
    """Checkpoints that are being saved, or were when their process died."""
    if isinstance(folder, Path):
        return list(folder.glob("*.orbax-checkpoint-tmp*"))
    return [path for path in folder.glob("*") if path.name.isdecimal() and not is_there(path)]


def _newest_whole(folder: Path, broken: Callable[[Path, str], None]) -> int | None:
    """The newest step that is whole; calls `broken(path, damage)` for each it has to pass over."""
    for step in reversed(_steps(folder)):
        found = damage(folder / str(step))
        if not found:
            return step
        broken(folder / str(step), found)
    return None


def _set_aside(path, found):
    """Frees the name of a broken checkpoint, so that the same step can be saved again."""
    names = (path.with_name(f"{path.name}.broken{suffix}") for suffix in ("", *(f"-{i}" for i in range(2, 1000))))
    aside = next(name for name in names if not name.exists())
    rename_tree(path, aside)
    print(f"checkpoint {path} is broken ({found}): kept as {aside.name} and not used")


def damage(folder: Path) -> str:
    """What a checkpoint lost since it was saved, in words; "" if it is whole."""
    try:
        files = [(name, int(size), checksum) for name, (size, checksum) in _contents(folder)["files"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {CONTENTS} is missing, as in earlier versions, or damaged"
    found = sizes(folder)
    for name, size, _ in files:
        if name not in found:
            return f"{words.name(name)} is missing"
        if found[name] != size:
            return f"{words.name(name)} has {found[name]} bytes, not {size}"
    if not isinstance(folder, Path):
        return ""  # no part of a file is ever there, and the store compares checksums: not every host need read all of it
    summed = [(folder / name, checksum) for name, _, checksum in files if checksum is not None]
    for (path, checksum), found in zip(summed, _checksums([path for path, _ in summed])):
        if found != checksum:
            return f"{words.name(str(path.relative_to(folder)))} has other content"
    return ""


def _list_files(folder, but, contents, summed):
    """Writes what a folder holds, and size and checksum of files but one; of more than `summed` bytes they have no checksum."""
    found = {name: size for name, size in sorted(sizes(folder).items()) if name != but}
    sums = iter(_checksums([folder / name for name, size in found.items() if size <= summed]))
    contents["files"] = {name: (size, next(sums) if size <= summed else None) for name, size in found.items()}
    (folder / CONTENTS).write_text(json.dumps(contents))  # ends in a brace: no part of it can be read


def _checksums(files):
    """CRC-32 of files, read in threads: zlib lets go of Python's lock."""

    def one(path):
        total = 0
        with path.open("rb") as file:
            while part := file.read(2**24):
                total = zlib.crc32(part, total)
        return total

    with concurrent.futures.ThreadPoolExecutor() as threads:
        return list(threads.map(one, files))


def _contents(folder):
    return read_json(folder / CONTENTS, finite=False)  # a figure may be NaN


def _figures(folder):
    try:
        return {str(name): float(value) for name, value in _contents(folder)["figures"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def save_params(folder: Path, params: Params) -> None:
    """Writes one tree of parameters, complete or not at all, and then the checksums of its files."""
    with contextlib.nullcontext() if isinstance(folder, Path) else _writing(folder):
        ocp.save(_for_orbax(folder), params, overwrite=True)
    if jax.process_index() == 0:
        _list_files(folder, CONTENTS, {}, math.inf)


# (path, array) -> the arrays it becomes, by path
Become = Callable[[tuple[str, ...], Any], dict[tuple[str, ...], Any]]


def load_params(folder: Path, like: Params, part: str = "state", become: Become | None = None) -> Params:
    """Reads the parameters of a folder that `save_params` or `Checkpoints` wrote.

    Args:
      folder: of `save_params`, or of one step of `Checkpoints`.
      like: tree of shapes, whose dtypes and shardings (if any) the arrays get.
      part: "state" of `save_params`, "model" or "ema" of `Checkpoints`.
      become: what is done with each array as soon as it is read. The largest come first, one at a time, and are let go: a
        device never holds more than the result and a copy of one of the smaller arrays.
    Raises:
      ValueError: the folder holds other leaves than `like`; the first is named. Or it cannot be read, or is not what was
        saved: process 0 compares checksums, which folders of earlier versions do not have.
    """
    folder = _for_orbax(folder)
    _inspect(folder)
    with _readable(folder):
        found = ocp.checkpointables_metadata(folder).metadata.get(part)
    check(like, found, f"checkpoint {folder}, {part}")
    local = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or local), like)
    if become is None:
        with _readable(folder):
            return ocp.load_checkpointables(folder, {part: like})[part]
    flat, laid_out = flatten_dict(like), {}
    size = {path: math.prod(x.shape) for path, x in flat.items()}
    falling = sorted(flat, key=size.get, reverse=True)
    small = [path for path in falling if 64 * size[path] < sum(size.values())]
    for group in [*([path] for path in falling[: len(falling) - len(small)]), small]:
        for path, leaf in _load_some(folder, part, {path: flat[path] for path in group}).items():
            made = become(path, leaf)
            laid_out |= jax.block_until_ready(made)
            if all(leaf is not x for x in made.values()):
                leaf.delete()
    return unflatten_dict(laid_out)


def _load_some(folder, part, like):
    """Arrays of a folder by path."""
    if not like:
        return {}
    with _partial(), _readable(folder):
        return flatten_dict(ocp.load_checkpointables(folder, {part: unflatten_dict(like)})[part])


def _inspect(folder):
    """Refuses a folder with something else than files in it (Orbax would wait for a pipe), or with changed ones."""
    if not folder.is_dir() or not any(folder.iterdir()):
        raise ValueError(f"{folder} is no folder of parameters; get it again")
    files = folder.rglob("*") if isinstance(folder, Path) else ()
    odd = next((path for path in files if not (path.is_file() or path.is_dir())), None)
    if odd is not None:
        raise ValueError(f"{odd} is no regular file; get {folder} again")
    if jax.process_index() == 0 and (folder / CONTENTS).exists() and (found := damage(folder)):
        raise ValueError(f"{folder} is damaged: {found}; get it again")


@contextlib.contextmanager
def _readable(folder):
    """Whatever Orbax raises is said of a folder, as one sentence."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{folder} cannot be read, it is damaged or no folder of parameters: {words.reason(error)}"
        ) from error


def load_matching(
    folder: Path, params: Params, part: str = "state", fresh: Sequence[str] = ()
) -> tuple[Params, list[str], list[str]]:
    """Puts the parameters of a folder in the place of others, or of their shapes, except the leaves that are to begin anew.

    Args:
      folder: as for `load_params`.
      params: nested dict of arrays or shapes; what is read takes their type and sharding.
      part: as for `load_params`.
      fresh: patterns searched in the paths of the leaves; what they match stays as it is in `params`.
    Returns:
      The parameters, the paths of the leaves that stayed, and paths of the folder that have no place in `params`.
    Raises:
      ValueError: a leaf is missing in the folder or has another shape and is not named in `fresh`, or a pattern matches
        no leaf.
    """
    folder = _for_orbax(folder)
    _inspect(folder)
    with _readable(folder):
        have, want = _shapes(ocp.checkpointables_metadata(folder).metadata.get(part)), flatten_dict(params, sep="/")
    for pattern in fresh:
        if not any(re.search(pattern, name) for name in want):
            raise ValueError(f"fresh has {pattern!r}, which matches none of the parameters {', '.join(want)}")
    stay = [name for name in want if any(re.search(pattern, name) for pattern in fresh)]
    read = {}
    for name, x in want.items():
        if name in stay:
            continue
        if have.get(name) != x.shape:
            state = f"has shape {have[name]} in" if name in have else "is missing in"
            raise ValueError(
                f"{name} {state} {folder}, but the configured model needs shape {x.shape}; add {name} to `fresh` to "
                "begin it anew, or change the model"
            )
        read[name] = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    if not read:
        raise ValueError(f"fresh is {tuple(fresh)}, which leaves nothing to load from {folder}")
    loaded = _load_some(folder, part, {tuple(name.split("/")): x for name, x in read.items()})
    loaded = {"/".join(path): x for path, x in loaded.items()}
    return unflatten_dict(want | loaded, sep="/"), stay, sorted(have.keys() - want.keys())


def _for_orbax(folder):
    """The path that Orbax is given."""
    if str(folder).startswith("s3://"):
        _teach_s3()
    return absolute(folder)


@functools.cache
def _teach_s3():
    """Orbax (0.12) stores arrays by tensorstore, which knows s3://, but asks it for disks and gs:// only.

    Raises:
      ValueError: it does not ask as it did.
    """
    try:
        from orbax.checkpoint._src.path import gcs_utils
        from orbax.checkpoint._src.serialization import tensorstore_utils as asking

        remote, normal, spec = asking._use_gcs_driver, asking._normalize_path, gcs_utils.get_kvstore_for_gcs
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"checkpoints cannot be in s3:// with this version of Orbax ({error}); mount the bucket, and give the path"
        ) from error

    def with_s3(path):
        bucket, _, rest = path.removeprefix("s3://").partition("/")
        set_by = {"endpoint": ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"), "aws_region": ("AWS_DEFAULT_REGION", "AWS_REGION")}
        more = {key: os.environ[name] for key, names in set_by.items() for name in names if name in os.environ}
        return {"driver": "s3", "bucket": bucket, "path": rest, **more} if path.startswith("s3://") else spec(path)

    asking._use_gcs_driver = lambda path: path.startswith("s3://") or remote(path)
    asking._normalize_path = lambda path: re.sub("^s3:/+", "s3://", normal(path))
    gcs_utils.get_kvstore_for_gcs = with_s3


def _writing(folder):
    """How Orbax writes: to a bucket in place, with a last file that says that all is there."""
    context = ocp.Context()
    if not isinstance(folder, Path):
        context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
    return context


def _partial():
    """What is read by orbax inside may be a part of what the folder holds."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    return context


def _moments_of_frozen(like: Any, found: Any) -> set[str]:
    """Leaves of an optimiser that earlier versions kept for parameters that are not trained."""
    want, have = _shapes(like), _shapes(found)
    moments = {name: re.fullmatch(r"(opt/.*)/(mu|nu)/(.+)", name) for name in have.keys() - want.keys()}
    both = lambda match: {f"{match[1]}/{kind}/{match[3]}" for kind in ("mu", "nu")}  # noqa: E731
    return {name for name, match in moments.items() if match and both(match) <= moments.keys()}


def check(like: Any, found: Any, where: str, unused: Collection[str] = ()) -> None:
    """Raises a ValueError that names the first leaf in which a checkpoint's metadata differs from `like`, but for `unused`."""
    if found is None:
        raise ValueError(f"{where}: not in the checkpoint")
    want, have = _shapes(like), _shapes(found)
    for name in [*want, *have]:
        if name not in have:
            raise ValueError(
                f"{where}: leaf {name} of shape {want[name]} is missing; the config and the checkpoint differ"
            )
        if name in unused and name not in want:
            continue
        if name not in want:
            raise ValueError(f"{where}: leaf {name} of shape {have[name]} is not part of the configured model")
        if want[name] != have[name]:
            raise ValueError(
                f"{where}: leaf {name} has shape {have[name]}, but the configured model needs {want[name]}"
            )


def _shapes(tree):
    """Shape by path of the leaves of a tree of arrays, shapes or orbax's metadata."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(leaf)
        if leaf.shape is None
        else tuple(leaf.shape)
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }
