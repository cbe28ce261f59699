"""What is made once and kept: in ~/.cache/ar_jax, or in the folder that AR_JAX_CACHE names, which hosts may share."""

import functools
import hashlib
import logging
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax

VARIABLE = "AR_JAX_CACHE"

_until_exit: list[tempfile.TemporaryDirectory] = []


def place(kind: str) -> Path:
    """The folder of what is kept of a kind; one of this process alone where nothing can be written."""
    folder = wanted(kind)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
        reason = "it is not writable"
    except OSError as error:
        reason = error
    return _own(str(folder), str(reason))


def wanted(kind: str) -> Path:
    """Where that folder should be."""
    from ar_jax.files.places import on_disk

    named = os.environ.get(VARIABLE)
    return (on_disk(named, VARIABLE).expanduser() if named else Path.home() / ".cache" / "ar_jax") / kind


@functools.cache
def _own(folder, reason):
    logging.warning("nothing can be kept in %s (%s); set %s to another folder", folder, reason, VARIABLE)
    _until_exit.append(tempfile.TemporaryDirectory(prefix="ar_jax-"))
    return Path(_until_exit[-1].name)


def key(parts: Iterable[object]) -> str:
    """A name for what is made of these: a hash of their texts."""
    digest = hashlib.sha256()
    for part in parts:
        text = str(part).encode("utf-8", "surrogateescape")
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()[:32]


def make(paths: Sequence[Path], write: Callable[[int, Path], None]) -> None:
    """Makes the files that are missing; none has its name before it is whole.

    Processes begin at different ones and pass over those that others have made by then, so those that share the folder
    share the work. Two may make the same file, which harms nothing.

    Args:
      paths: of the files.
      write: number of a file, and where to write it.
    """
    first = 0
    if jax.distributed.is_initialized():
        first = len(paths) * jax.process_index() // jax.process_count()
    for i in [*range(first, len(paths)), *range(first)]:
        if paths[i].exists():
            continue
        part = paths[i].with_name(f"{paths[i].name}.{uuid.uuid4().hex[:8]}.part")
        try:
            write(i, part)
            part.chmod(0o644)  # safetensors' are for the user alone
            os.replace(part, paths[i])
        finally:
            part.unlink(missing_ok=True)
