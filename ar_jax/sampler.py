"""From a model folder to images: what `sample.py`, `ar_jax.evaluate` and Python share."""

import dataclasses
import functools
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro

from ar_jax.data import Info, label_ids
from ar_jax.decode.edit import Edit, free_slots
from ar_jax.decode.sampling import Sampling, adjustable, read_sampling
from ar_jax.files.images import to_float, to_uint8
from ar_jax.files.models import Model, open_model
from ar_jax.machine.flops import with_fields
from ar_jax.machine.sharding import batch_sharding, put, shard
from ar_jax.nets.resize import resize
from ar_jax.orders import OrderFn, known_first
from ar_jax.typing import Array, Batch, Int, Key


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
    batch: int = 25
    """Images drawn at a time, over all devices."""
    resize: int = 0
    """Side in pixels to resize to (bicubic, as LlamaGen's 384-pixel images are to 256); 0 keeps the model's."""
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of parameters and matrix products of the generator."""
    unroll: bool | None = None
    """Lay the layers out one by one: faster loops on CPU, longer compilation. Left out: if a step reveals one token."""
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


class Given(NamedTuple):
    """A part of an image to be kept.

    Attributes:
      image: uint8 [H W c], as the tokenizer makes them.
      free: bool [H W], pixels that are drawn.
      scales: of the tokenizer's scales the first so many are kept whole.
      paste: kept pixels are the image's own, not the tokenizer's.
    """

    image: np.ndarray
    free: np.ndarray
    scales: int = 0
    paste: bool = True


class Drawn(NamedTuple):
    """An image.

    Attributes:
      row: its place in the batch.
      image: uint8 [h w 3].
      calls: how often each network was called for it.
      accepted: tokens accepted at each call of the generator, int [c].
    """

    row: int
    image: np.ndarray
    calls: dict[str, int]
    accepted: np.ndarray


Draw = Callable[[Batch, np.ndarray], Iterator[Drawn]]


class Drawer(NamedTuple):
    """A generator and a tokenizer ready to draw.

    Attributes:
      model, tokenizer: their folders.
      generator, decoder, order: the networks and the order, with what sampling changes of them.
      sampling: the model's own, or what was asked for.
      options: as asked for.
    """

    model: Model
    tokenizer: Model
    generator: nn.Module
    decoder: nn.Module
    order: OrderFn
    sampling: Sampling
    options: Sampler

    def compile(self, mesh: jax.sharding.Mesh, given: Given | None = None) -> Draw:
        """Reads the parameters and makes one program over all processes.

        It takes conditions and image numbers, the same on every process, and gives the images of this process's rows.
        Images that are not finite raise ValueError.
        """
        options, sampling, decoder, order_fn = self.options, self.sampling, self.decoder, self.order
        share = mesh.shape["data"] * mesh.shape["fsdp"]
        if options.resize < 0:
            raise ValueError(
                f"--resize is {options.resize}; it must be a number of pixels, or 0 to keep the model's size"
            )
        if options.batch < 1 or options.batch % share:
            raise ValueError(
                f"--batch is {options.batch}; it must be a positive multiple of the {share} batch shares of the mesh"
            )
        dtype = jnp.dtype(options.dtype).type
        generator = with_fields(self.generator, dtype=dtype)
        params = self.model.params(dtype=dtype, average=options.average)
        frozen = self.tokenizer.params(average=options.average)
        if by_token(generator, order_fn) if options.unroll is None else options.unroll:
            generator, params = generator.unrolled(params)
        params = put(params, shard(params, mesh, generator.rules))
        frozen = put(frozen, shard(frozen, mesh, decoder.rules))

        known = np.zeros(decoder.spec.n, bool)
        if given is not None and generator.any_order:
            known = np.asarray(~free_slots(decoder.spec, given.free[None])[0])

        @functools.partial(jax.jit, out_shardings=batch_sharding(mesh))
        def program(params, frozen, batch, ids, pixels):
            keys, order_keys = image_keys(options.seed, ids)
            order, edit = order_fn(generator.spec, order_keys, len(ids), 0), None
            if given is not None:
                if generator.any_order:
                    order = known_first(order_fn, generator.spec, known, order_keys)
                image, free = (jnp.broadcast_to(x, (len(ids), *x.shape)) for x in pixels)
                edit = Edit(to_float(image), free, given.scales, int(known.sum()))
            images, account = sampling.images(generator, decoder, params, frozen, batch, order, keys=keys, edit=edit)
            if given is not None and given.paste:
                images = jnp.where(edit.free[..., None], images, edit.image)
            finite = jnp.isfinite(images).all((1, 2, 3))
            return to_uint8(resize(images, (options.resize,) * 2) if options.resize else images), finite, account

        def draw(batch, ids):
            batch, ids = put((batch, ids.astype(np.uint32)), batch_sharding(mesh))
            with jax.set_mesh(mesh):
                drawn = program(params, frozen, batch, ids, given and (given.image, given.free))
            parts = [x.addressable_shards for x in jax.tree.leaves(drawn)]
            for shards in zip(*parts):
                if shards[0].replica_id:  # of copies of these rows, one is written
                    continue
                values = [np.asarray(shard.data) for shard in shards]
                images, finite, account = jax.tree.unflatten(jax.tree.structure(drawn), values)
                if not finite.all():
                    raise ValueError(
                        f"images drawn from {self.model.folder} hold NaN or infinity; are its weights or those of "
                        f"{self.tokenizer.folder} damaged, or too large for {options.dtype}?"
                    )
                for i, image in enumerate(images):
                    calls = {name: int(count[i]) for name, count in account.calls.items()}
                    image = np.broadcast_to(image, (*image.shape[:2], 3))
                    yield Drawn((shards[0].index[0].start or 0) + i, image, calls, account.accepted[i])

        return draw


def image_keys(seed: int, ids: Int[Array, "b"]) -> tuple[Key[Array, "b"], Key[Array, "b"]]:
    """Keys for the tokens of numbered images and for their orders."""
    roots = jax.random.split(jax.random.key(seed))
    return tuple(jax.vmap(functools.partial(jax.random.fold_in, root))(ids) for root in roots)


def by_token(generator: nn.Module, order: OrderFn) -> bool:
    """Whether every step of an order reveals one token."""
    return set(order(generator.spec, jax.random.split(jax.random.key(0), 1), 1, 0).sizes) == {1}


def open_drawer(run: str, options: Sampler) -> Drawer:
    """The generator of a folder and its tokenizer.

    Raises:
      ValueError: no such models, or they do not fit each other or the options.
    """
    model, tokenizer = open_models(run, options)
    sampling = options.sampling or own_sampling(model, options.parts)
    parts = model.module, tokenizer.module, model.order
    sampling = dataclasses.replace(sampling, fields=changes(sampling, parts, options.fields))
    generator, decoder, order = sampling.adapted(*parts)
    makes, takes = generator.spec, decoder.spec
    if (makes.codes, makes.channels, makes.n) != (takes.codes, takes.channels, takes.n):

        def of(spec):
            return f"{spec.n} tokens " + (f"with codes {spec.codes}" if spec.codes else f"of {spec.channels} numbers")

        raise ValueError(
            f"the generator makes {of(makes)}, but the tokenizer {tokenizer.folder} has {of(takes)}; give --tokenizer"
        )
    return Drawer(model, tokenizer, generator, decoder, order, sampling, options)


def open_models(run: str, options: Sampler) -> tuple[Model, Model]:
    """The generator of a folder and its tokenizer.

    Raises:
      ValueError: no such models.
    """
    model = open_model(run, "generator", options.checkpoint).fixed()
    own = model.settings.get("tokenizer")
    if not (options.tokenizer or own):
        raise ValueError(f"{model.folder} holds a generator only; give its tokenizer with --tokenizer FOLDER")
    return model, open_model(options.tokenizer or model.folder / own, "tokenizer").fixed()


def own_sampling(model: Model, file: str = "") -> Sampling:
    """How a model says that it is drawn from, or what a file makes of that (see `sampling_file`)."""
    return sampling_file(file, read_sampling(model.settings.get("sampling", {}), model.module))


def sampling_file(file: str, own: Sampling) -> Sampling:
    """What `get_sampling` of a Python file makes of a model's own way; without a file that way.

    Raises:
      ValueError: no such file, or it does not return a `Sampling`.
    """
    if not file:
        return own
    if Path(file).suffix != ".py" or not Path(file).is_file():
        raise ValueError(f"--sampling is {file!r}, which is no Python file")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.get_sampling(own) if hasattr(module, "get_sampling") else None
    if not isinstance(made, Sampling):
        raise ValueError(f"--sampling {file}: its get_sampling(own) must return an ar_jax Sampling, got {made!r}")
    return made


# Options of a model ----------------------------------------------------------------------------------------


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
    sampler = Sampler(sampling=sampling, fields=_fields(sampling, parts))
    return sampler, _spelt_out(arguments, prefix, sampler)


def _is_model(name):
    return not name.startswith("-") and any((Path(name) / part / "model.json").is_file() for part in ("", "generator"))


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


def _fields(sampling, parts):
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
    """What the docstring of a class says of an attribute."""
    for owner in kind.__mro__:
        text = inspect.cleandoc(owner.__doc__ or "").partition("Attributes:\n")[2]
        for names, words in re.findall(r"^  ([\w, ]+): (.*(?:\n    .*)*)", text, re.MULTILINE):
            if field in names.split(", "):
                return " ".join(words.split())
    return ""


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


def condition_table(info: Info, options: Sampler, labels: tuple[str, ...] = ()) -> tuple[list[str], Batch]:
    """The conditions to go through in turn: their names, and arrays whose first axis runs over them.

    Raises:
      ValueError: a label the model does not know, or the wrong kind of condition for it.
    """
    if info.text_width:
        if labels:
            raise ValueError("--labels given, but this model takes captions; give --captions")
        if options.features:
            with np.load(options.features, allow_pickle=False) as file:
                text, mask = file["features"].astype(np.float32), file["mask"].astype(bool)
            names = [f"features {i}" for i in range(len(text))]
        elif not options.captions:
            raise ValueError("this model takes captions; give --captions or --features")
        elif info.text == "minilm":
            from ar_jax.text.minilm import encode

            names = list(options.captions)
            text, mask = encode(names, info.text_rows)
        else:
            raise ValueError(f"this model was trained on features of {info.text!r}; give them with --features")
        if text.shape[1:] != (info.text_rows, info.text_width) or mask.shape != text.shape[:2]:
            raise ValueError(
                f"--features has shapes {text.shape} and {mask.shape}; the model needs [N {info.text_rows} "
                f"{info.text_width}] and [N {info.text_rows}]"
            )
        return names, {"text": text, "text_mask": mask}
    if options.captions or options.features:
        raise ValueError("captions given, but this model takes class labels; give --labels")
    ids = label_ids(info, list(labels)) if labels else list(range(info.classes))
    names = [info.class_names[i] if info.class_names else str(i) for i in ids]
    return names, {"label": np.asarray(ids, np.int32)}
