"""Options of commands that draw: those that every model has, and those that a model says it has.

The parts of a model's sampling, and what its modules call `adjustable`, become options with the model's values and the words
of its docstrings.
"""

import ast
import dataclasses
import functools
import inspect
import itertools
import re
import textwrap
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from ar_jax.config import CONFIGS, run_file
from ar_jax.decode.sampling import Sampling, adjustable
from ar_jax.files.models import Model, blamed, open_model
from ar_jax.files.places import on_disk, path_of
from ar_jax.files.trust import Untrusted
from ar_jax.files.words import shown
from ar_jax.machine.precision import Precision
from ar_jax.machine.seeds import Seed


@dataclasses.dataclass(frozen=True)
class Fields:
    """What can be changed of a model without training; every model has its own (see `options_of`)."""


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How images are drawn from a model folder."""

    tokenizer: str = ""
    """Folder of the tokenizer, for converted generators; a run knows its own."""
    captions: tuple[str, ...] = ()
    """Captions, used in turn."""
    features: str = ""
    """Caption features instead of captions: .npz with `features` [N rows c] and `mask` [N rows]."""
    text_encoder: str = ""
    """Folder of the T5 or CLIP (config.json, tokenizer.json, .safetensors) whose features the model was trained on."""
    batch: int = 25
    """Images drawn at a time, over all devices."""
    resize: int = 0
    """Side in pixels to resize to (bicubic, as LlamaGen's 384-pixel images are to 256); 0 keeps the model's."""
    seed: Seed = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the generator's matrix products, kernels and embeddings; all else is float32."""
    pixels: Literal["own", "float32", "bfloat16"] = "own"
    """Of the tokenizer's layers where tokens become pixels; own is what it was trained with."""
    precision: Precision = "default"
    """Of products of float32 numbers: GPUs take tensorfloat32 by default, TPUs bfloat16; highest is float32."""
    unroll: bool | None = None
    """Lay the layers out one by one: faster loops on CPU, longer compilation. Left out: if most steps reveal one token."""
    average: bool = True
    """Use the moving average of the weights, if the checkpoint has one."""
    checkpoint: str = "newest"
    """Of the generator: newest, best (of those kept with `keep_best`), or a step."""
    sampling: Annotated[Sampling | None, tyro.conf.arg(name="")] = None
    """The model's own if left out."""
    parts: Annotated[str, tyro.conf.arg(name="sampling")] = ""
    """A Python file whose `get_sampling(own)` returns how images are drawn, given the model's own way."""
    fields: Annotated[Fields, tyro.conf.arg(name="")] = Fields()
    """Fields of the model that are changed."""

    @property
    def numerics(self) -> dict[str, str]:
        """What tells drawings of other numerics apart; what is as it always was is not said."""
        others = {"pixels": self.pixels, "precision": self.precision}
        return {"dtype": self.dtype} | {name: value for name, value in others.items() if value not in ("own", "default")}


# Short names of options; of several long ones, the first that a model has.
SHORT = {
    "guidance": ("guidance.weight",),
    "guidance-last": ("guidance.last",),
    "guidance-reach": ("guidance.reach",),
    "temperature": ("temperature.value",),
    "top-k": ("filter.top-k",),
    "top-p": ("filter.top-p",),
    "banned": ("filter.banned",),
    "segments": ("decoder.segments",),
    "steps": ("order.steps",),
    "scales": ("tokenizer.scales",),
    "refine": ("generator.refine",),
    "anneal": ("generator.anneal", "generator.head.anneal"),
    "inner-steps": ("generator.steps", "generator.head.steps"),
    "last-inner-steps": ("generator.last-steps", "generator.head.last-steps"),
}


# What other programs of the field call an option
ELSEWHERE = {
    "cfg-scale": "guidance", "cfg": "guidance", "guidance-scale": "guidance", "num-samples": "count", "num-images": "count",
    "num-fid-samples": "count", "n-samples": "count", "batch-size": "batch", "per-proc-batch-size": "batch", "class-labels": "labels",
    "classes": "labels", "class-ids": "labels", "prompt": "captions", "prompts": "captions", "output": "out", "outdir": "out",
    "sample-dir": "out", "num-steps": "steps", "num-inference-steps": "steps", "topk": "top-k", "topp": "top-p",
}  # fmt: skip


def open_models(run: str, options: Sampler) -> tuple[Model, Model]:
    """The generator of a folder and its tokenizer; asks nothing of the devices, which processes have not yet joined.

    Raises:
      ValueError: no such models.
    """
    model = open_model(run, "generator", options.checkpoint)
    if options.tokenizer:
        return model, open_model(options.tokenizer, "tokenizer")
    if not (own := model.settings.get("tokenizer")):
        raise ValueError(
            f"{model.folder} holds a generator only; give its tokenizer with --tokenizer FOLDER (settings.tokenizer of its "
            f"model.json names none)"
        )
    try:
        return model, open_model(model.folder / own, "tokenizer")
    except Untrusted:
        raise
    except (ValueError, OSError) as error:
        what = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{model.folder / 'model.json'}: settings.tokenizer is {shown(own)}: {what}") from error


def own_sampling(model: Model, file: str = "") -> Sampling:
    """How a model says that it is drawn from, or what a file makes of that (see `sampling_file`)."""
    return sampling_file(file, model.sampling)


def sampling_file(file: str, own: Sampling) -> Sampling:
    """What `get_sampling` of a Python file makes of a model's own way; without a file that way.

    What is no file here may be a published one: `configs/sampling/jacobi.py`.

    Raises:
      ValueError: no such file, or it does not return a `Sampling`.
    """
    if not file:
        return own
    path = on_disk(file, "--sampling")
    if not path.is_file() and path.parent == Path("configs/sampling"):
        path = CONFIGS / "sampling" / path.name
    if path.suffix != ".py" or not path.is_file():
        published = ", ".join(f"configs/sampling/{known.name}" for known in sorted((CONFIGS / "sampling").glob("*.py")))
        raise ValueError(f"--sampling is {file!r}, which is no Python file; published are {published}")
    module = run_file(path)
    made = module.get_sampling(own) if hasattr(module, "get_sampling") else None
    if not isinstance(made, Sampling):
        raise ValueError(f"--sampling {file}: its get_sampling(own) must return an ar_jax Sampling, got {made!r}")
    return made


def options_of(arguments: list[str], prefix: str = "") -> tuple[Sampler, list[str]]:
    """The options of the model that a command line names, with its values; and the arguments with short names spelt out.

    Args:
      arguments: of the command; the first that is a model folder is taken.
      prefix: of the options' names, such as "sampler.".
    """
    run = next((name for name in arguments if _is_model(name)), None)
    if run is None:
        return Sampler(), arguments
    given = {name: _option(arguments, f"--{prefix}{name}") for name in ("tokenizer", "sampling", "checkpoint")}
    options = Sampler(given["tokenizer"] or "", checkpoint=given["checkpoint"] or "newest")
    try:
        model, tokenizer = open_models(run, options)
    except ValueError:  # said again, in full, by `open_drawer`
        return Sampler(), arguments
    sampling = own_sampling(model, given["sampling"] or "")
    parts = model.module, tokenizer.module, model.order
    with blamed(model, tokenizer):
        sampler = Sampler(sampling=sampling, fields=fields_of(sampling, parts))
    return sampler, _spelt_out(arguments, prefix, sampler)


def _is_model(name):
    return not name.startswith("-") and any((path_of(name) / part / "model.json").is_file() for part in ("", "generator"))


def _option(arguments, name):
    for i, word in enumerate(arguments):
        if word == name and i + 1 < len(arguments):
            return arguments[i + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def _spelt_out(arguments, prefix, sampler):
    has, spelt = {*_names(sampler.sampling), *_names(sampler.fields)}, []
    for word in arguments:
        name, equals, value = word.partition("=")
        short = name.removeprefix(f"--{prefix}").replace("_", "-")
        if name.startswith("--") and short in ELSEWHERE:
            raise ValueError(f"there is no option {name}; here it is --{prefix}{ELSEWHERE[short]}")
        if name.startswith(f"--{prefix}") and short in SHORT:
            long = next((long for long in SHORT[short] if long in has), None)
            if long is None:
                raise ValueError(
                    f"{name}: this model has no {' or '.join(SHORT[short])}; it has {', '.join(sorted(has))}"
                )
            word = f"--{prefix}{long}{equals}{value}"
        spelt.append(word)
    return spelt


def _names(value):
    """Names of options that a dataclass comes to, those of dataclasses in it with dots."""
    for field in dataclasses.fields(value):
        inner, name = getattr(value, field.name), field.name.replace("_", "-")
        if dataclasses.is_dataclass(inner):
            yield from (f"{name}.{rest}" for rest in _names(inner))
        else:
            yield name


def _model(parts):
    return dict(zip(("generator", "tokenizer", "order"), parts))


def fields_of(sampling: Sampling, parts: tuple[Any, Any, Any]) -> Fields:
    """A dataclass of what can be changed of a model, with its values and the words of its docstrings."""
    values = adjustable(**_model(sampling.adapted(*parts)))
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *owners, field = path.split(".")
        place = tree
        for owner in owners:
            place = place.setdefault(owner, {})
        part, kind = _place(parts, path)
        if callable(value):
            continue  # a function has no form on a command line
        words = get_origin(kind) is tuple
        kind = Annotated[str if words else kind, tyro.conf.arg(help=described(type(part), field))]
        place[field] = (kind, show_numbers(value) if words else value)

    def build(name, entries, bases=()):
        built = {key: build(key, entry) if isinstance(entry, dict) else entry for key, entry in entries.items()}
        rows = [(key, *(value if isinstance(value, tuple) else (type(value), value))) for key, value in built.items()]
        return dataclasses.make_dataclass(name, rows, bases=bases, frozen=True)()

    return build("Fields", tree, (Fields,))


def _place(parts, path):
    """The module or order that has a field, and the field's type."""
    name, *owners, field = path.split(".")
    part = functools.reduce(getattr, owners, _model(parts)[name])
    return part, get_type_hints(type(part)).get(field, Any)


def changes(sampling: Sampling, parts: tuple[Any, Any, Any], fields: Fields) -> tuple[tuple[str, Any], ...]:
    """`Sampling.fields`, with what was asked for on a command line in place of the model's values."""
    values, chosen = adjustable(**_model(sampling.adapted(*parts))), dict(sampling.fields)
    for path, value in _values(fields):
        if isinstance(values[path], tuple):
            (inner, *_) = get_args(_place(parts, path)[1])
            value = read_numbers(value, path, lists=get_origin(inner) is tuple)
        if value != values[path]:
            chosen[path] = value
    return tuple(chosen.items())


def _values(fields, owner=""):
    for field in dataclasses.fields(fields):
        value = getattr(fields, field.name)
        if dataclasses.is_dataclass(value):
            yield from _values(value, f"{owner}{field.name}.")
        else:
            yield owner + field.name, value


def described(kind: type, field: str) -> str:
    """What a class says of an attribute: in its docstring, or in one below the attribute."""
    for owner in kind.__mro__:
        text = inspect.cleandoc(owner.__doc__ or "").partition("Attributes:\n")[2]
        for names, words in re.findall(r"^  ([\w, ]+): (.*(?:\n    .*)*)", text, re.MULTILINE):
            if field in names.split(", "):
                return " ".join(words.split())
        if field in inspect.get_annotations(owner):
            return _below(owner).get(field, "")
    return ""


@functools.cache
def _below(kind):
    """Attributes of a class and the texts that follow them in its source."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    except (OSError, TypeError, SyntaxError):  # made by a program
        return {}
    return {
        line.target.id: " ".join(below.value.value.split())
        for line, below in itertools.pairwise(tree.body)
        if isinstance(line, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
    }


def show_numbers(value: tuple) -> str:
    """Numbers as words: 1,2,4x8 of numbers and pairs, or several such lists with spaces between them."""
    if any(isinstance(item, tuple) and len(item) != 2 for item in value):
        return " ".join(show_numbers(item) for item in value)
    return ",".join("x".join(map(str, item)) if isinstance(item, tuple) else str(item) for item in value)


def read_numbers(text: str, name: str, lists: bool = False) -> tuple:
    """The inverse of `show_numbers`.

    Args:
      name: of the option.
      lists: several lists are meant, not one.
    Raises:
      ValueError: something else.
    """
    words = [[part.split("x") for part in one.split(",")] for one in text.split()]
    if not all(len(part) in (1, 2) and all(side.isdecimal() for side in part) for one in words for part in one):
        raise ValueError(
            f"--{name} is {text!r}; give numbers such as 1,2,3,5,8, pairs (height x width) such as 4x8, or several such "
            f"lists such as '1 1,3 1,1,2,5'"
        )
    found = tuple(tuple(int(x[0]) if len(x) == 1 else (int(x[0]), int(x[1])) for x in one) for one in words)
    return found if lists or not found else found[0]


def replaced(value: Any, path: str, new: Any) -> Any:
    """A value with a part inside it replaced, such as "guidance.weight" of a `Sampling`.

    Raises:
      ValueError: it has no such part.
    """
    name, _, rest = path.partition(".")
    if not hasattr(value, name):
        raise ValueError(f"{path} is no setting of {type(value).__name__}")
    return dataclasses.replace(value, **{name: replaced(getattr(value, name), rest, new) if rest else new})
