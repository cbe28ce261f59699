"""Looks at what ar_jax needs here, and says for each problem the line that mends it.

    python -m ar_jax.doctor [--folder runs] [--name value ...]

It prints versions, devices, memory, caches, the extras that are installed, whether a small program compiles and runs on
all devices, whether the folder of runs can be written and has room, and, started on every host with the options of
train.py (`--launch...`), whether all hosts see each other and one folder. Exits with 1 if there is a problem; what is
absent and only some commands need is no problem. Nothing is installed or changed.
"""

import importlib.metadata
import importlib.util
import platform
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

OWN = "ar_jax"
ASIDE = ("tpu", "cuda", "test", "compare")  # extras for machines that are elsewhere, and for work on ar_jax itself


class Finding(NamedTuple):
    """What was looked at.

    Attributes:
      state: "good", "problem", or "absent" for what only some commands need.
      what: was found.
      mend: a line that mends it, or brings what is absent.
    """

    state: str
    what: str
    mend: str = ""


def main(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    problems = report(packages())
    if problems:  # the rest could not be imported
        raise SystemExit(
            f"doctor: {problems} problem{'s' * (problems > 1)}; the rest is looked at once packages are right"
        )
    from ar_jax.machine import checks

    checks.examine(arguments, report)


def report(findings: Iterator[Finding]) -> int:
    """Prints findings as they come; returns the number of problems."""
    problems = 0
    for found in findings:
        problems += found.state == "problem"
        print(f"{found.state:<8} {found.what}", flush=True)
        if found.mend:
            print(f"{'':<8} -> {found.mend}", flush=True)
    return problems


def packages() -> Iterator[Finding]:
    """Python and the packages that ar_jax says it needs; imports none of them."""
    here = platform.python_version()
    try:
        needs = importlib.metadata.requires(OWN) or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("problem", f"Python {here} in {sys.prefix} does not have ar_jax installed", "pip install -e .")
        return
    required, extras = [], {}
    for line in needs:
        extra = re.search(r"extra == ['\"](.+?)['\"]", line)
        (extras.setdefault(extra[1], []) if extra else required).append(line.partition(";")[0].strip())
    lacking = [what for line in required if (what := lacks(line))]
    versions = ", ".join(
        f"{name} {version_of(name)}" for name in ("ar_jax", "jax", "jaxlib", "flax", "orbax-checkpoint")
    )
    yield Finding("good", f"Python {here}, {versions}")
    if lacking:
        yield Finding("problem", f"packages: {'; '.join(lacking)}", installed(required))
    if version_of("jax") != version_of("jaxlib"):
        mend = f"pip install jaxlib=={version_of('jax')}"
        yield Finding("problem", "jax and jaxlib are not of one version", mend)
    for name, lines in extras.items():
        if name not in ASIDE and (lacking := [what for line in lines if (what := lacks(line))]):
            yield Finding("absent", f"extra {name}: {'; '.join(lacking)}", installed(lines))
    if whole := [name for name, lines in extras.items() if name not in ASIDE and not any(map(lacks, lines))]:
        yield Finding("good", f"extras: {', '.join(whole)}")


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def lacks(requirement: str) -> str:
    """What is wrong with a package as "name[extra]>=1.2" asks for it; "" if nothing."""
    name, _, least = re.sub(r"\[.*?\]", "", requirement).partition(">=")
    found = version_of(name.strip())
    if found == "missing":
        return f"{name} is missing"
    if _numbers(found) < _numbers(least):
        return f"{name} is {found}, older than {least}"
    return ""


def installed(requirements: list[str]) -> str:
    """The command that brings those that are lacking."""
    return "pip install " + " ".join(f"'{line}'" for line in requirements if lacks(line))


def _numbers(version):
    return [int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3]]


if __name__ == "__main__":
    main(sys.argv[1:])
