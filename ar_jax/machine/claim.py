"""One process, or one command on several hosts, at a time in a folder."""

import contextlib
import datetime
import fcntl
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from ar_jax.machine.distributed import say

NAME = ".claim"


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """A context in which no other command works in a folder; of several processes, the first claims it for all.

    Nothing is claimed in a bucket.

    The system drops a claim with the process that holds it, however that ends.

    Raises:
      ValueError: somebody works in it: who, since when.
    """
    if jax.process_index() or not isinstance(folder, Path):  # buckets know no locks
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / NAME, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"{folder} is in use by {file.read().strip() or 'another process'}; stop that one first, wait until it ends, or "
                "give another --name"
            ) from None
        except OSError as error:
            say(f"{folder}: its file system has no locks ({error.strerror}), so a second run in it would not be noticed")
        file.truncate(0)
        now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        print(f"process {os.getpid()} on {socket.gethostname()} since {now}: {shlex.join(sys.argv)}", file=file, flush=True)
        try:
            yield
        finally:
            file.truncate(0)
            with contextlib.suppress(OSError):  # nothing else was written
                if [path.name for path in folder.iterdir()] == [NAME]:
                    (folder / NAME).unlink()
                    folder.rmdir()
