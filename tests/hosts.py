"""Runs a command as several processes that find one another on 127.0.0.1, as on several hosts."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def started(
    command: Sequence[object],
    *,
    processes: int = 2,
    only: Sequence[int] | None = None,
    devices: int = 1,
    env: dict[str, object] | None = None,
) -> list[subprocess.Popen]:
    """Starts `python COMMAND --launch...` once per process, each with so many CPU devices; `only` starts some of them."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"  # the last one counts
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | {name: str(value) for name, value in (env or {}).items()}
    launch = ("--launch.coordinator", f"127.0.0.1:{free_port()}", "--launch.processes", processes)
    alone = ("--launch.processes", 1)
    return [
        subprocess.Popen(
            list(map(str, (sys.executable, *command, *((*launch, "--launch.process", i) if processes > 1 else alone)))),
            cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in (range(processes) if only is None else only)
    ]  # fmt: skip


def ended(running: list[subprocess.Popen], timeout: float = 120) -> list[tuple[int, str, str]]:
    """Exit code, standard output and standard error of each."""
    try:
        said = [process.communicate(timeout=timeout) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(running, said, strict=True)]


def run(command: Sequence[object], **settings) -> list[str]:
    """What the processes of a command that must succeed print."""
    results = ended(started(command, **settings))
    for code, out, err in results:
        assert code == 0, f"exit code {code}\n{out}\n{err}"
    return [out for _, out, _ in results]
