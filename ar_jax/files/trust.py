"""Whose code may run when a file names it: this package's, and that of packages the user trusts.

A model folder is a stranger's until its reader says otherwise, and to import a module is to run it. So nothing outside
`ar_jax` is imported because a file names it, unless the command line (`--trust`), the environment (`AR_JAX_TRUST`) or
the running program (`trust`) has named its package.
"""

import importlib.util
import os
import shlex
import sys
from pathlib import Path
from types import ModuleType

PACKAGE = "ar_jax"
VARIABLE = "AR_JAX_TRUST"
HELP = f"""\
--trust MODULE|FILE.py   models may use code of this package or file of your own, which runs when they are opened; may be
                         given several times, or {VARIABLE}=MODULE,... for all commands
"""

_trusted: set[str] = set()


class Untrusted(ValueError):
    """A file names something of a package that is not trusted."""


def trust(name: str) -> None:
    """Lets files name things of a package or module, and of those inside it.

    Args:
      name: as it is imported, `my_package` or `my_package.heads`, or a path: `path/to/my_method.py` or `path/to/my_package`
        is `my_method` or `my_package`, and its folder goes first on the import path.
    Raises:
      ValueError: neither a module's name nor such a path.
    """
    path = Path(name).expanduser()
    if path.suffix == ".py" or len(path.parts) > 1:
        if not (path.is_file() and path.suffix == ".py") and not (path / "__init__.py").is_file():
            raise ValueError(f"--trust {name}: there is no such file, and no package (a folder with __init__.py)")
        path = path.resolve()
        if str(path.parent) not in sys.path:
            sys.path.insert(0, str(path.parent))
            importlib.invalidate_caches()
        name = path.stem
    if not _is_module(name):
        raise ValueError(f"--trust {name!r} is no module such as my_package, and no path such as path/to/my_method.py")
    _trusted.add(name)


def taken(arguments: list[str]) -> list[str]:
    """The arguments of a command without `--trust NAME` (or NAME,NAME), which is done; asked for help, says what it does."""
    rest, given = [], iter(arguments)
    for argument in given:
        option, equals, names = argument.partition("=")
        if option != "--trust":
            rest.append(argument)
            continue
        names = names if equals else next(given, "")
        if not names or names.startswith("-"):
            raise ValueError(
                "--trust needs a name: a package such as my_package, or a file such as path/to/my_method.py"
            )
        for name in names.split(","):
            trust(name)
    if {"-h", "--help"} & set(rest):
        print(HELP)
    return rest


def trusted(module: str) -> bool:
    """Whether a module is trusted: itself or a package it lies in."""
    for name in filter(None, os.environ.get(VARIABLE, "").split(",")):
        trust(name)
    return any(module == name or module.startswith(f"{name}.") for name in _trusted)


def load(module: str, named: str, hint: str = "") -> ModuleType:
    """Imports a module that a file names.

    Args:
      module: its name.
      named: what the file names, for messages.
      hint: where the file says that the module lay when it was written; told to the user, and nothing else.
    Raises:
      ValueError: it is not trusted (`Untrusted`), or cannot be imported.
    """
    if not _is_module(module):
        raise ValueError(f"{named} is no name of a class or function, such as my_package.module:Class")
    ours = module.split(".")[0] == PACKAGE
    if not (ours or trusted(module)):
        package = module.split(".")[0]
        way = shlex.quote(hint) if not _importable(package) and _lies_at(package, hint) else package
        raise Untrusted(
            f"{named} lies outside {PACKAGE}, and to open this model runs the code of {package}. If you trust that code, "
            f"give --trust {way} or set {VARIABLE}={way}"
        )
    try:
        return importlib.import_module(module)
    except Exception as error:  # whatever the code of a trusted module raises
        if ours:
            raise ValueError(f"{named} is not in this version of {PACKAGE}") from error
        what = f"{type(error).__name__}: {error}"
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
            what = f"it cannot be found here; give its path, --trust PATH/{module.split('.')[0]}.py"
        raise ValueError(f"{named} needs the module {module}, but {what}") from error


def _is_module(name):
    return isinstance(name, str) and all(part.isidentifier() for part in name.split("."))


def _importable(package):
    """Whether a top-level name can be imported; looks for it without running it."""
    return package in sys.modules or importlib.util.find_spec(package) is not None


def _lies_at(package, hint):
    if not isinstance(hint, str) or not hint.isprintable() or Path(hint).stem != package:
        return False
    return Path(hint).is_file() or (Path(hint) / "__init__.py").is_file()
