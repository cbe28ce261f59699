"""One training at a time in a run folder."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import jax

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

NAME = ".training"


@contextlib.contextmanager
def claimed(run: str | os.PathLike) -> Iterator[None]:
    """Holds a run folder for this training, by process 0; it is made if missing, and removed again if it stays empty.

    The system gives it free when the process ends, however it ends, so no claim outlives its training. File systems without
    locks, and places that are no disks (gs://...), are not guarded.

    Raises:
      ValueError: another training has it; the sentence says which and since when.
    """
    if jax.process_index() != 0 or fcntl is None or "://" in str(run):
        yield
        return
    run = Path(run)
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    run.mkdir(parents=True, exist_ok=True)
    mark = run / NAME
    with open(mark, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read(200).strip() or "another process"
            raise ValueError(
                f"{run} is being trained by {who}; wait for it, stop it, or give --name for a run beside it"
            ) from None
        except OSError:  # this file system has no locks
            pass
        try:
            with contextlib.suppress(OSError):  # a full disk: who has the folder is not said, but it is had
                file.truncate(0)
                file.write(
                    f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M')}\n"
                )
                file.flush()
            yield
        finally:
            mark.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # something is in it
                for folder in made:
                    folder.rmdir()
