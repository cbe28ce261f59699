"""One command started on several hosts: how its processes find one another, agree, and fail together."""

import contextlib
import dataclasses
import os
import socket
import sys
import threading
import time
import traceback
import urllib.request
import uuid
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

FOREVER = 7 * 24 * 3600  # seconds


@dataclasses.dataclass(frozen=True)
class Launch:
    """Which processes work together. Cloud TPU, Slurm and Open MPI tell by themselves; elsewhere give the first three."""

    coordinator: str = ""
    """HOST:PORT of process 0, as the others reach it."""
    processes: int = 0
    """How many there are; 1 works alone, whatever the surroundings say."""
    process: int = -1
    """Number of this one, from 0."""
    timeout: int = 300
    """Seconds to wait until all have started."""
    heartbeat: int = 100
    """Seconds without a sign of life after which a process counts as dead and the others stop."""


def join(launch: Launch, notices: bool = False) -> None:
    """Connects the processes of this command; call it before anything touches a device.

    If they are not all there after `launch.timeout` seconds, this process ends with a sentence and exit code 1.

    Args:
      launch: the options.
      notices: this command asks for `multihost_utils.reached_preemption_sync_point`; JAX then catches SIGTERM.
    Raises:
      ValueError: options that do not go together, or surroundings that do not tell enough.
    """
    global _host
    _check(launch)
    who, count = ("the command line", launch.processes) if launch.processes else surroundings()
    if count == 1:
        return
    jax.config.update("jax_enable_preemption_service", notices)
    # In the end JAX aborts with a stack trace; it gets more time, so that these words come first
    timer = threading.Timer(launch.timeout, _give_up, (who, count, launch))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            launch.coordinator or None,
            launch.processes or None,
            launch.process if launch.processes else None,
            cluster_detection_method="deactivate" if launch.processes else None,
            initialization_timeout=launch.timeout + 60,
            heartbeat_timeout_seconds=launch.heartbeat,
            shutdown_timeout_seconds=FOREVER,  # processes that are done wait for the others while these live
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise ValueError(
            f"{who} asks for {count} processes, but they cannot be connected: {str(error).rstrip('.')}. {HOW}"
        ) from error
    finally:
        timer.cancel()
    if jax.process_count() != count:
        raise ValueError(
            f"{who} asks for {count} processes, but the devices belong to {jax.process_count()}; start one process on "
            f"every host"
        )
    _host = _count_host()


class Host(NamedTuple):
    """Processes of this command on this machine, and those of them that may run on the same cores."""

    processes: int = 1
    sharing: int = 1


_host = Host()  # counted by `join`


def neighbours() -> int:
    """Processes of this command on this machine, this one included."""
    return _host.processes


def cores() -> int:
    """Processor cores for this process: those it may run on, divided among the processes that share them."""
    return max(1, len(_allowed()) // _host.sharing)


def _allowed() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _count_host() -> Host:
    """Asks all processes where they run."""
    machine = socket.gethostname()
    mine = np.array([zlib.crc32(text.encode()) for text in (machine, f"{machine} {_allowed()}")], np.uint32)
    return Host(*(int(same) for same in (multihost_utils.process_allgather(mine) == mine).sum(0)))


HOW = (
    "Start the same command on every host (`gcloud compute tpus tpu-vm ssh NAME --worker=all --command=...`, "
    "`srun python ...`), or on each give --launch.coordinator HOST:PORT --launch.processes N --launch.process I; "
    "--launch.processes 1 works alone"
)


def surroundings() -> tuple[str, int]:
    """Who started this process, and how many belong together as far as that is known."""
    env = os.environ
    if "OMPI_COMM_WORLD_SIZE" in env:
        return "Open MPI", int(env["OMPI_COMM_WORLD_SIZE"])
    if "SLURM_NTASKS" in env:
        return "Slurm", int(env["SLURM_NTASKS"])
    hosts = env.get("TPU_PROCESS_ADDRESSES", env.get("TPU_WORKER_HOSTNAMES", ""))
    slices = env.get("MEGASCALE_NUM_SLICES", "")
    if not hosts and "TPU_SKIP_MDS_QUERY" not in env:  # which JAX sets where there is no TPU
        hosts = _metadata("worker-network-endpoints")
        facts = (line.partition(":") for line in _metadata("tpu-env").splitlines() if hosts)
        slices = slices or {name.strip(): value.strip(" '") for name, _, value in facts}.get("MEGASCALE_NUM_SLICES", "")
    return "Cloud TPU", len(hosts.split(",")) * int(slices or 1)


def _metadata(name: str) -> str:
    """An attribute of a virtual machine of Google Cloud; empty elsewhere."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/{name}", headers={"Metadata-Flavor": "Google"}
    )
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def _check(launch):
    host, _, port = launch.coordinator.rpartition(":")
    if launch.coordinator and not (host and port.isdigit() and 0 < int(port) < 2**16):
        raise ValueError(f"launch.coordinator is {launch.coordinator!r}; it must be HOST:PORT, such as 10.0.0.2:8476")
    if min(launch.timeout, launch.heartbeat) < 1:
        raise ValueError(
            f"launch.timeout and launch.heartbeat are {launch.timeout} and {launch.heartbeat}; they must be at least 1"
        )
    given = launch.coordinator != "", launch.processes != 0, launch.process != -1
    alone = launch == dataclasses.replace(launch, coordinator="", processes=1, process=-1)
    if any(given) and not alone and not (all(given) and 0 <= launch.process < launch.processes):
        raise ValueError(
            f"launch.coordinator={launch.coordinator!r}, launch.processes={launch.processes} and launch.process="
            f"{launch.process} do not go together; give all three, with process from 0 to processes - 1, or none"
        )
    if launch.coordinator and launch.process == 0:  # XLA would crash, or share the port with another coordinator
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        try:
            socket.create_server(("", int(port)), family=family, dualstack_ipv6=both).close()
        except OSError as error:
            raise ValueError(f"launch.coordinator is {launch.coordinator!r}, but {error}; give a free port") from error


def _give_up(who, count, launch):
    me = f"process {launch.process}" if launch.processes else "this host"
    at = f" (coordinator {launch.coordinator})" if launch.coordinator else ""
    print(
        f"{sys.argv[0]}: {who} asks for {count} processes, but {me} has waited {launch.timeout} s for the others in "
        f"vain{at}. {HOW}. Started everywhere already? Then process 0 cannot be reached from here or from there, or "
        f"needs longer: see launch.timeout",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


@contextlib.contextmanager
def command(name: str) -> Iterator[None]:
    """The body of a command: what a user can mend ends as one sentence and a non-zero exit code.

    Of several processes, one that fails leaves at once: JAX would let it wait for the others, and these for it.
    SystemExit passes through; it is for what all processes do together.
    """
    try:
        yield
    except SystemExit:
        raise
    except KeyboardInterrupt as error:
        if jax.distributed.is_initialized():
            os._exit(130)
        print(f"{name}: interrupted", file=sys.stderr)
        raise SystemExit(130) from error
    except BaseException as error:
        alone = not jax.distributed.is_initialized()
        known = isinstance(error, ValueError | OSError)
        if alone and known:
            raise SystemExit(f"{name}: {error}") from error
        if alone:
            raise
        sys.stdout.flush()
        who = f"{name}, process {jax.process_index()} of {jax.process_count()}"
        said = f"{who}: {error}" if known else f"{who}:\n{traceback.format_exc()}"
        print(said, file=sys.stderr, flush=True)
        os._exit(1)


def say(message: str) -> None:
    """Prints once for all processes."""
    if jax.process_index() == 0:
        print(message, flush=True)


def barrier(name: str) -> None:
    """Waits for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agreed(values: Any) -> Any:
    """What process 0 says, a tree of numbers and arrays; on the others only its shapes count."""
    return multihost_utils.broadcast_one_to_all(values)


def gathered(number: int) -> np.ndarray:
    """The numbers (below 2^31) that the processes have, int [processes]."""
    if jax.process_count() == 1:
        return np.array([number])
    return multihost_utils.process_allgather(np.int32(number))


def seen(paths: Sequence[Path], patience: float = 30.0) -> bool:
    """Whether files are there, those of other processes after a while: a network file system shows them late."""
    end = time.monotonic() + patience
    while not all(path.exists() for path in paths):
        if jax.process_count() == 1 or time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def check_shared(folder: Path, patience: float = 30.0) -> None:
    """Refuses a folder (made if missing) that the processes do not share.

    Args:
      patience: seconds until a file that process 0 writes has to be seen by the others.
    Raises:
      ValueError: on processes that do not see it.
    """
    if jax.process_count() == 1:
        return
    number = agreed(uuid.uuid4().int % 2**31)
    mark = folder / f".shared-{number}"
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    barrier(f"mark {number}")
    if not seen([mark], patience):
        raise ValueError(
            f"{folder} is not the same folder here as on process 0; all hosts need one that they share (NFS, "
            f"Filestore, a mounted bucket)"
        )
    barrier(f"seen {number}")
    if jax.process_index() == 0:
        mark.unlink()
