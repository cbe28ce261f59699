"""Modules to JSON and back, so that a checkpoint folder says what it holds without running anybody's code.

What may stand in a place is decided by the place: by the annotation of the field, or by the type that the caller of
`decode` expects. Names of classes and functions are looked up in those packages of `ar_jax` that hold parts of models, and
in modules that the user trusts (`trust`).
"""

import collections.abc
import dataclasses
import functools
import inspect
import json
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.files import trust
from ar_jax.files.trust import PACKAGE
from ar_jax.files.words import shown
from ar_jax.typing import Having, Within

# of parts of models in ar_jax
PROGRAMS = f"{PACKAGE}.train.exported"  # what runs a file that a model names, so it asks for trust
HOMES = ("decode", "generators", "heads", "nets", "orders", "tokenizers", "tokens", "train.teachers")
MOVED: dict[str, str] = {  # "module:name" as earlier versions wrote it -> as it is now
    f"{PACKAGE}.generators.fractal:{name}": f"{PACKAGE}.{module}:{name}"
    for module, names in (
        ("nets.fractal", ("Repeated", "FromAbove", "Entered", "Enclosed")),
        ("heads.colours", ("Tied", "Colours")),
    )
    for name in names
}
DROPPED = {"output_major": False}  # fields of modules that earlier versions wrote, and the one value that they had
LARGEST = 2**24  # a number in a model's description is no larger, to either side; beyond it are damage and malice
LONGEST = 2**25  # bytes of a JSON file
WORDIEST = 1024  # characters of a text in it
DTYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32",
          "float64", "bfloat16")  # fmt: skip
COMPUTED = ("float16", "bfloat16", "float32", "float64")  # of them, those that networks compute with


def encode(value: Any) -> Any:
    """JSON-able form of a module: nested dataclasses, functions by name, dtypes, arrays, plain values.

    Names outside `ar_jax` are written too. What is encoded is part of this program already, so this process trusts its
    modules from then on: a training goes on with its config's own methods without being told to trust them.

    Raises:
      ValueError: something that has no such form, or that could not be found again by its name.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": str(value.dtype)}
    if isinstance(value, types.FunctionType):
        return {"function": _name(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if "type" in (fields := _fields(type(value))):
            raise ValueError(
                f"{type(value).__name__} has a field named type, which its JSON keeps for the class; rename it"
            )
        parts = {}
        for name in fields:
            part = getattr(value, name)
            if isinstance(part, nn.Module) and (other := parts.setdefault(id(part), name)) != name:
                raise ValueError(
                    f"{other} and {name} of {type(value).__name__} are the same module, which would share its parameters; "
                    "make two of them"
                )
        return {"type": _name(type(value)), **{name: encode(getattr(value, name)) for name in fields}}
    try:
        return {"dtype": jnp.dtype(value).name}
    except TypeError:
        raise ValueError(f"{value!r} cannot be written to JSON; functions and dataclasses can") from None


def _name(thing):
    name, module = f"{thing.__module__}:{thing.__qualname__}", sys.modules.get(thing.__module__)
    if thing.__module__ == "__main__" or module is None:
        where = "the script that runs" if module else f"{thing.__module__}.py, which is a config"
        raise ValueError(
            f"{thing.__qualname__} lies in {where}; put it into a file beside that one and import it, so that a model "
            "folder can name it"
        )
    if getattr(module, thing.__qualname__, None) is not thing:
        raise ValueError(f"{name} cannot be found again by its name; give a class or function at the top of a module")
    if not _ours(thing.__module__) or thing.__module__ == PROGRAMS:
        trust.trust(thing.__module__)
    return name


def files(encoded: Any) -> dict[str, str]:
    """Files (of packages, folders) of the top-level modules outside `ar_jax` that an encoded value names."""
    if isinstance(encoded, list):
        return {name: file for item in encoded for name, file in files(item).items()}
    if not isinstance(encoded, dict):
        return {}
    found = files(list(encoded.values()))
    package = str(encoded.get("type") or encoded.get("function") or PACKAGE).partition(":")[0].split(".")[0]
    file = None if package == PACKAGE else getattr(sys.modules.get(package), "__file__", None)
    if file:
        path = Path(file).resolve()
        found[package] = str(path.parent if path.name == "__init__.py" else path)
    return found


def decode(value: Any, kind: Any, where: str = "value", hints: collections.abc.Mapping[str, str] | None = None) -> Any:
    """The inverse of `encode`; lists become tuples.

    Args:
      value: from JSON, perhaps a stranger's.
      kind: the type that is expected, as a field is annotated: a class, of which the value must be (a subclass counts, and
        any module from outside where a module is expected); `Callable[[A, ...], R]`, a function or dataclass annotated
        so; numbers, text, tuples, arrays, unions; `Any`, everything but functions. Fields of dataclasses are held to
        their annotations in turn; a plain `Callable` means a callable like the field's default.
      where: what the value is, for messages.
      hints: see `files`; told to the user where a module is not trusted.
    Raises:
      ValueError: a name that does not exist or may not stand there, an unknown or missing field, or a value of another
        kind; with where it stands. `trust.Untrusted` for names of modules that are not trusted.
    """
    return _decode(value, kind, where, hints or {}, -LARGEST)


def _decode(value, kind, where, hints, least):
    options = _options(kind)
    if isinstance(value, dict):
        return _thing(value, options, where, hints, _words(kind, least))
    for option in options:
        if isinstance(value, list | tuple) and (each := _items(option, len(value))) is not None:
            pairs = enumerate(zip(value, each))
            return tuple(
                _decode(item, inner, f"{where}[{i}]", hints, -LARGEST if float in _options(inner) else least)
                for i, (item, inner) in pairs
            )
        if not isinstance(value, list | tuple) and _plain(value, option, least):
            return value
    raise ValueError(f"{where} is {shown(value)}; it must be {_words(kind, least)}")


def _thing(value, options, where, hints, needed):
    """What a JSON object stands for: an array, a dtype, a function, or a dataclass with its fields."""
    if value.keys() == {"array", "dtype"}:
        if not {np.ndarray, Any} & set(options):
            raise ValueError(f"{where} is an array; it must be {needed}")
        return _array(value, where)
    if value.keys() == {"dtype"}:
        allowed = DTYPES if Any in options else COMPUTED if np.dtype in options else ()
        if value["dtype"] not in allowed:
            raise ValueError(f"{where} is {shown(value)}; it must be {needed}")
        return jnp.dtype(value["dtype"]).type
    if value.keys() == {"function"}:
        found = _find(value["function"], f"{where}.function", hints)
        if not isinstance(found, types.FunctionType):
            raise ValueError(f"{where} is {shown(value['function'])}, which is no function")
        if not any(_called_like(found, option) for option in options):
            raise ValueError(f"{where} is {shown(value['function'])}; it must be {needed}")
        return found
    if "type" not in value:
        raise ValueError(f"{where} is {shown(value)}; it must be {needed}")
    found = _find(value["type"], f"{where}.type", hints)
    if not isinstance(found, type) or not dataclasses.is_dataclass(found):
        raise ValueError(f"{where}.type is {shown(value['type'])}, which is no dataclass")
    if not any(_is_a(found, option) for option in options):
        raise ValueError(f"{where}.type is {shown(value['type'])}; {where} must be {needed}")
    return build(found, {name: field for name, field in value.items() if name != "type"}, where, hints)


def build(kind: type, values: Any, where: str, hints: collections.abc.Mapping[str, str] | None = None) -> Any:
    """A dataclass from the JSON of its fields; see `decode`."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {shown(values)}; it must be the fields of {kind.__name__}")
    fields = _fields(kind)
    values = {name: x for name, x in values.items() if name in fields or x is not DROPPED.get(name, values)}
    if unknown := [name for name in values if name not in fields]:
        raise ValueError(
            f"{where} has {shown(unknown[0])}, which is no field of {kind.__name__}; it has {', '.join(fields)}"
        )
    made = {}
    for name, (annotation, default) in fields.items():
        required = default is dataclasses.MISSING
        if name not in values:
            if required:
                raise ValueError(f"{where}.{name} is missing")
            continue
        least = _least(default, required) if _ours(kind.__module__) else -LARGEST
        made[name] = _decode(values[name], _like(annotation, default), f"{where}.{name}", hints or {}, least)
    try:
        return kind(**made)
    except Exception as error:  # what its own checks raise
        raise ValueError(f"{where}: {error}") from error


def check(settings: Any, where: str = "") -> None:
    """Holds the numbers of settings to what is said of their fields, as `decode` does those of a file.

    Args:
      settings: a dataclass of ours; others in it are left alone.
      where: what it is, for messages.
    Raises:
      ValueError: it names the first field with a number that may not stand there.
    """
    for name, (annotation, default) in _fields(type(settings)).items() if _ours(type(settings).__module__) else ():
        value, at = getattr(settings, name), f"{where}.{name}".lstrip(".")
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            check(value, at)
        elif (numbers := jax.tree.leaves(value)) and all(isinstance(each, int | float) for each in numbers):
            least = _least(default, default is dataclasses.MISSING)
            _decode(value, _like(annotation, default), at, {}, least)


def _least(default, required):
    """The smallest number that may stand in a field of our own: none is below 0 but those that are by default, and whole
    numbers that are needed, or by default above 0, are at least 1."""
    numbers = [x for x in jax.tree.leaves(default) if isinstance(x, int | float)]
    if any(x < 0 for x in numbers):
        return -LARGEST
    return int(required or (bool(numbers) and all(isinstance(x, int) and x > 0 for x in numbers)))


@functools.cache
def _fields(kind):
    """Annotation and default of every field that is given to a dataclass."""
    hidden = ("parent", "name") if issubclass(kind, nn.Module) else ()
    try:
        hints = typing.get_type_hints(kind, include_extras=True)
    except Exception:  # names that exist for type checkers only
        hints = {}
    found = {}
    for field in dataclasses.fields(kind):
        if field.init and field.name not in hidden:
            made = field.default_factory is not dataclasses.MISSING
            found[field.name] = hints.get(field.name, Any), field.default_factory() if made else field.default
    return found


# Names -----------------------------------------------------------------------------------------------------


def _ours(module):
    return module.split(".")[0] == PACKAGE


def _find(name, where, hints):
    """The class or function that a file names: defined where the name says, and not merely imported there."""
    if not isinstance(name, str):
        raise ValueError(f"{where} is {shown(name)}; it must be a name such as {PACKAGE}.orders:raster")
    module, _, attribute = MOVED.get(name, name).partition(":")
    named = f"{where}: {shown(name)}"
    if not attribute.isidentifier():
        raise ValueError(f"{named} is no name of a class or function, such as {PACKAGE}.orders:raster")
    if module == PROGRAMS and not trust.trusted(module):
        raise trust.Untrusted(
            f"{named} runs a program of jax.export that this model names. If you trust that file, give --trust {PROGRAMS} or "
            f"set {trust.VARIABLE}={PROGRAMS}"
        )
    if _ours(module) and module != PROGRAMS and not any(f"{module}.".startswith(f"{PACKAGE}.{home}.") for home in HOMES):
        raise ValueError(f"{named} is no part of a model; those lie in {PACKAGE}.{', '.join(HOMES)}")
    found = getattr(trust.load(module, named, hints.get(module.split(".")[0], "")), attribute, None)
    if found is None:
        raise ValueError(f"{named} does not exist " + (f"in this version of {PACKAGE}" if _ours(module) else "there"))
    if getattr(found, "__module__", None) != module:
        raise ValueError(f"{named} is not defined there")
    return found


# Kinds -----------------------------------------------------------------------------------------------------


def _options(kind):
    """The alternatives of an annotation; what `Within` and `Having` say stays on each."""
    if typing.get_origin(kind) is typing.Annotated:
        kind, *marks = typing.get_args(kind)
        marks = tuple(mark for mark in marks if isinstance(mark, Within | Having))
        return [typing.Annotated[(option, *marks)] if marks else option for option in _options(kind)]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return [option for part in typing.get_args(kind) for option in _options(part)]
    return [Any if kind in (Any, object) or isinstance(kind, typing.TypeVar) else kind]


def _marked(option, mark):
    """An option without what is said of it, and what a mark says (or None)."""
    if typing.get_origin(option) is not typing.Annotated:
        return option, None
    option, *marks = typing.get_args(option)
    return option, next((found for found in marks if isinstance(found, mark)), None)


def _like(annotation, default):
    """The annotation of a field; a plain `Callable` is one like the default, and `Any` a dtype if the default is one."""
    if annotation is Any and isinstance(getattr(default, "dtype", None), np.dtype):
        return np.dtype
    if annotation not in (Callable, typing.Callable):
        return annotation
    return _signature(default) if callable(default) else Callable


def _signature(function) -> Any:
    """`Callable[[...], R]` of a function, a class of callables or one of them; `Callable` if not annotated, None if not one."""
    skip = 0
    if not isinstance(function, types.FunctionType):
        kind, skip = function if isinstance(function, type) else type(function), 1
        if not any("__call__" in vars(base) for base in kind.__mro__):
            return None
        function = kind.__call__
    try:
        hints = typing.get_type_hints(function)
        parameters = list(inspect.signature(function).parameters.values())[skip:]
    except (TypeError, NameError, ValueError):
        return Callable
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if "return" not in hints or len(positional) < len([p for p in parameters if p.default is p.empty]):
        return Callable  # or takes others as well, such as *numbers
    return Callable[[hints.get(name, Any) for name in positional], hints["return"]]


def _called_like(thing, wanted):
    """Whether a function or a class of callables takes and returns what `wanted` says.

    The number of arguments, the first of them (if it is annotated) and what is returned have to agree.
    """
    has = _signature(thing)
    if wanted in (Callable, typing.Callable):
        return has is not None and not _ours(thing.__module__)  # nothing says what it is for
    if typing.get_origin(wanted) is not collections.abc.Callable:
        return False
    if typing.get_origin(has) is not collections.abc.Callable:
        return False
    (takes, gives), (given, returned) = typing.get_args(wanted), typing.get_args(has)
    if takes is ... or not takes:
        return _alike(gives, returned) and takes in (..., given)
    return _alike(gives, returned) and len(takes) == len(given) and (given[0] is Any or _alike(takes[0], given[0]))


def _alike(a, b):
    """Whether two annotations are the same, or of arrays both."""
    parts = [option for kind in (a, b) for option in _options(kind)]  # jaxtyping's are unions
    return a == b or all(part in (jax.Array, np.ndarray) or hasattr(part, "array_type") for part in parts)


def _is_a(kind, option):
    """Whether a dataclass may stand where an annotation says `option`."""
    option, needs = _marked(option, Having)
    if needs and not all(hasattr(kind, name) for name in needs.names):
        return False
    if option is Any:
        return True
    if isinstance(option, type) and typing.get_origin(option) is None:
        other = not _ours(kind.__module__) and issubclass(option, nn.Module)  # one's own module in the place of ours
        return issubclass(kind, nn.Module if other else option)
    return _called_like(kind, option)


def _items(option, count):
    """Annotations of so many items of a list, or None if an annotation wants no such list."""
    origin, inner = typing.get_origin(option) or option, typing.get_args(option)
    if option is Any or origin in (list, collections.abc.Sequence) or (origin is tuple and not inner):
        return [inner[0] if inner else Any] * count
    if origin is not tuple:
        return None
    if len(inner) == 2 and inner[1] is ...:
        return [inner[0]] * count
    return list(inner) if len(inner) == count else None


def _plain(value, option, least):
    """Whether a number, a text or None is of a kind."""
    option, within = _marked(option, Within)
    low, high = (within.least, within.most) if within else (least, LARGEST)
    if isinstance(value, bool):
        return (option in (bool, Any) and (not within or low <= value <= high)) or _literal(value, option)
    if isinstance(value, int):
        return (option in (int, float, Any) and low <= value <= high) or _literal(value, option)
    if isinstance(value, float):
        return option in (float, Any) and low <= value <= high  # which NaN is not
    if isinstance(value, str):
        return (option in (str, Any) and len(value) <= WORDIEST) or _literal(value, option)
    return value is None and option in (types.NoneType, None, Any)


def _literal(value, option):
    return typing.get_origin(option) is typing.Literal and (type(value), value) in [
        (type(known), known) for known in typing.get_args(option)
    ]


def _words(kind, least=-LARGEST):
    """An annotation in words."""

    def word(option):
        option, within = _marked(option, Within)
        low, high = (within.least, within.most) if within else (least, LARGEST)
        numbers = f"number from {low} to {high}"
        plain = {
            int: f"a whole {numbers}", float: f"a {numbers}", str: "text", types.NoneType: "null",
            bool: "false" if within else "true or false", np.dtype: f"a dtype, one of {', '.join(COMPUTED)}",
        }  # fmt: skip
        if option in plain:
            return plain[option]
        if typing.get_origin(option) is typing.Literal:
            return "one of " + ", ".join(repr(value) for value in typing.get_args(option))
        if option is Any:
            return "a number no larger than 2^24, text, a list, a dtype, an array or part of a model"
        if isinstance(option, type) and typing.get_origin(option) is None:
            return option.__name__
        return str(option).replace("collections.abc.", "").replace("typing.", "")

    return " or ".join(dict.fromkeys(map(word, _options(kind))))


def _array(value, where):
    numbers, name = value["array"], value["dtype"]
    if name not in DTYPES or name == "bfloat16":
        raise ValueError(f"{where}.dtype is {shown(name)}; it must be one of {', '.join(DTYPES[:-1])}")
    try:
        raw = np.array(numbers)
        if raw.size and raw.dtype.kind not in "biuf":
            raise ValueError(f"it holds {raw.dtype.name} values")
        array = raw.astype(name)
        if not np.isfinite(array).all() or (array.dtype.kind != "f" and (array != raw).any()):
            raise ValueError(f"it holds numbers that {name} cannot hold")
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{where} is no array of numbers: {error}") from None
    return array


# Files -----------------------------------------------------------------------------------------------------


def read_json(path: Path, finite: bool = True) -> Any:
    """The content of a JSON file, which may be a stranger's.

    Args:
      finite: refuse NaN and infinity.
    Raises:
      ValueError: it is no regular file, or too large, or no JSON.
    """

    def constant(name):
        if finite:
            raise ValueError(f"it holds {name}, which is no number")
        return float(name)

    if not path.is_file():
        raise ValueError("it is no regular file")
    with path.open("rb") as file:
        content = file.read(LONGEST + 1)
    if len(content) > LONGEST:
        raise ValueError(f"it has more than {LONGEST} bytes")
    try:
        return json.loads(content.decode(), parse_constant=constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def difference(a: Any, b: Any, where: str = "module", sides: tuple[str, str] = ("there", "here")) -> str:
    """The first difference of two encoded values in words; empty if they are equal."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in [*a, *b]:
            if name not in a or name not in b:
                return f"{where}.{name} is only on one side"
            if found := difference(a[name], b[name], f"{where}.{name}", sides):
                return found
        return ""
    return "" if a == b else f"{where} is {shown(a)} {sides[0]} and {shown(b)} {sides[1]}"
