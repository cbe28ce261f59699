"""Model folders: a `model.json` that says what the model is, and its parameters.

Run folders and converted checkpoints are both of this kind, so every command takes either.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from ar_jax import __version__
from ar_jax.config import Experiment
from ar_jax.data import Data, Info
from ar_jax.decode.sampling import Sampling, read_sampling
from ar_jax.files import codec, words
from ar_jax.files.places import made, path_of
from ar_jax.files.trust import Untrusted
from ar_jax.machine.sharding import shard
from ar_jax.nets.linear import cast
from ar_jax.orders import OrderFn
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.train import checkpoint
from ar_jax.typing import Params

FORMAT = 1
IMAGENET = Info(classes=1000, captions=True, text="flan-t5-xl", text_rows=120, text_width=2048)  # and captions of it
KINDS = {  # and what a module of the kind has
    "tokenizer": ("spec", "init_params", "encode", "embed", "decode"),
    "generator": ("spec", "complete", "init_params", "condition", "loss", "begin", "step"),
}


@dataclasses.dataclass(frozen=True)
class Origin:
    """Which released file a converted folder came from: its family, name and entry, and entries that are no parameters."""

    family: str = ""
    file: str = ""
    entry: str = ""
    buffers: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Model:
    """What a model folder holds.

    Attributes:
      folder: where it lies.
      kind: "tokenizer" or "generator".
      module: the network.
      info: of the data it was trained on.
      settings: JSON-able extras: "sampling", "order", "tokenizer" (a folder, relative to this one), "origin", "data".
      checkpoint: which of a run's parameters: "newest", "best", or a step.
    """

    folder: Path
    kind: str
    module: nn.Module
    info: Info
    settings: dict[str, Any]
    checkpoint: str = "newest"

    def params(
        self, dtype: Any = None, average: bool = True, mesh: jax.sharding.Mesh | None = None, unrolled: bool = False
    ) -> Params:
        """The parameters: those of a converted folder, or a checkpoint's moving average (if it keeps one).

        Args:
          dtype: of kernels and embeddings (see `nets.linear.cast`); None leaves them as they are.
          average: False takes the trained parameters instead of their average.
          mesh: the devices over which they are divided as the module's rules say, each reading its own part; None is this
            process's first device, for all of them.
          unrolled: in the layout of `Generator.unrolled`.
        Raises:
          ValueError: there is no such checkpoint, or it is of another model.
        """
        if not jax.tree.leaves(self.shapes):
            return self.shapes
        (folder, part), like, become = self.place(average), self.shapes, None
        if dtype is not None:
            like = jax.eval_shape(functools.partial(cast, dtype=dtype), like)
        if unrolled:
            after = jax.eval_shape(lambda params: self.module.unrolled(params)[1], like)
            layout = mesh and flatten_dict(shard(after, mesh, self.module.by_layer().rules))

            def become(path, leaf):
                slices = functools.partial(self.module.slices, path)
                where = mesh and {name: layout[name] for name in jax.eval_shape(slices, leaf)}
                return jax.jit(slices, out_shardings=where)(leaf)

        if mesh is not None:
            layout_of_files = shard(like, mesh, self.module.rules)
            like = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), like, layout_of_files)
        try:
            return checkpoint.load_params(folder, like, part, become)
        except ValueError as error:
            raise ValueError(f"{self.folder / 'model.json'} and its parameters: {error}") from error

    @functools.cached_property
    def shapes(self) -> Params:
        """Shapes of the parameters.

        Raises:
          ValueError: no such network can be built.
        """
        path = self.folder / "model.json"
        try:
            found = jax.eval_shape(self.module.init_params, jax.random.key(0))
        except Exception as error:  # whatever a network of senseless sizes raises
            raise ValueError(f"{path}: the network of its module cannot be built: {words.reason(error)}") from error
        for name, leaf in jax.tree_util.tree_leaves_with_path(found):
            if not math.prod(leaf.shape):
                name = jax.tree_util.keystr(name, simple=True, separator="/")
                raise ValueError(f"{path}: the network of its module has a parameter {name} of shape {leaf.shape}")
        return found

    @property
    def order(self) -> OrderFn:
        """What a generator predicts next.

        Raises:
          ValueError: the folder does not say.
        """
        if "order" not in self.settings:
            raise ValueError(
                f"{self.folder / 'model.json'}: settings.order is missing; a generator is drawn in an order"
            )
        return codec.decode(self.settings["order"], OrderFn, "settings.order")

    @property
    def sampling(self) -> Sampling:
        """How a generator says that it is drawn from."""
        return read_sampling(self.settings.get("sampling", {}), self.module)

    def place(self, average: bool = True) -> tuple[Path, str]:
        """Folder and part that `checkpoint.load_params` reads the parameters from."""
        folder = self.folder / "params"
        if checkpoint.is_there(folder):
            return folder, "state"
        folder = self.folder / "checkpoints" / self.fixed().checkpoint
        return folder, "ema" if average and (folder / "ema").exists() else "model"

    def fixed(self) -> "Model":
        """The same, with the step of its checkpoint: a training that goes on makes newer ones."""
        if not jax.tree.leaves(self.shapes):
            return self  # a network without parameters has no checkpoints
        if not checkpoint.is_there(self.folder / "params"):
            step = checkpoint.find_step(self.folder / "checkpoints", self.checkpoint)
            return dataclasses.replace(self, checkpoint=str(step))
        if self.checkpoint != "newest":
            raise ValueError(
                f"checkpoint is {self.checkpoint!r}, but {self.folder} holds a single set of parameters; leave it out"
            )
        return self


def untrained(experiment: Experiment) -> tuple[nn.Module | None, nn.Module]:
    """The generator (or None) and the tokenizer of a config, complete as for ImageNet, without any file of theirs.

    A released tokenizer that the config takes from a folder is LlamaGen's VQ-16.
    """
    tokenizer = experiment.tokenizer.module
    if tokenizer is None:
        tokenizer = VQGAN(size=(experiment.data.size,) * 2)
    generator = experiment.generator.module
    return generator and generator.complete(tokenizer.spec, IMAGENET), tokenizer


def image_shape(tokenizer: nn.Module) -> tuple[int, int, int]:
    """Height, width and channels of the images that a tokenizer decodes to."""

    def decode(key):
        params, spec = tokenizer.init_params(key), tokenizer.spec
        tokens = (
            jnp.zeros((1, spec.n, spec.channels)) if spec.channels else jnp.zeros((1, spec.n, len(spec.codes)), int)
        )
        return tokenizer.apply({"params": params}, tokens, method="decode")

    return jax.eval_shape(decode, jax.random.key(0)).shape[1:]


def versions() -> dict[str, str]:
    """Versions of the libraries that numbers depend on."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {"ar_jax": __version__, **{name: importlib.metadata.version(name) for name in names}}


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, all of it or nothing; process 0 only."""
    if jax.process_index() != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with made(path) as part:
        part.write_text(json.dumps(value, indent=1) + "\n")


def fingerprint(params: Params) -> str:
    """A hash of parameters."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    return digest.hexdigest()


def describe(folder: Path, kind: str, module: nn.Module, info: Info, settings: dict[str, Any]) -> Model:
    """Writes the `model.json` of a folder.

    Raises:
      ValueError: something in it that could not be read again.
    """
    encoded = codec.encode(module)
    content = {
        "format": FORMAT, "kind": kind, "module": encoded, "info": dataclasses.asdict(info),
        "settings": settings, "versions": versions(),
    }  # fmt: skip
    if files := codec.files([encoded, settings]):
        content["code"] = files  # where code from outside lay: for the message that asks for trust, and nothing else
    _parsed(folder, content)
    write_json(folder / "model.json", content)
    return Model(folder, kind, module, info, settings)


def open_model(folder: str | os.PathLike, kind: str, checkpoint: str = "newest") -> Model:
    """The model of a kind in a model folder, or in a run folder that has one of that kind as sub-folder.

    Args:
      checkpoint: whose parameters are meant, if it is a run: "newest", "best", or a step.

    Raises:
      ValueError: there is none, or its `model.json` cannot be understood; `Untrusted` if it names code from outside that
        the user has not trusted (see `trust`).
    """
    folder = path_of(folder)
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {tuple(KINDS)}")
    for place in (folder, folder / kind):
        if (place / "model.json").is_file():
            found = _read(place)
            if found.kind == kind:
                return dataclasses.replace(found, checkpoint=checkpoint)
    holds = f"holds a {_read(folder).kind}" if (folder / "model.json").is_file() else "holds no model.json"
    what = "does not exist" if not folder.exists() else holds
    raise ValueError(f"{folder} {what}; a {kind} is needed: the folder of a run of train.py or of ar_jax.convert")


@contextlib.contextmanager
def blamed(*models: Model) -> Iterator[None]:
    """Whatever goes wrong inside is said, as a ValueError, of the descriptions of these models."""
    try:
        yield
    except Exception as error:
        files = " with ".join(str(model.folder / "model.json") for model in models)
        raise ValueError(f"{files}: no images can be drawn so: {words.reason(error)}") from error


def holds(folder: str | os.PathLike, kind: str) -> bool:
    """Whether a folder has a model of a kind, itself or as sub-folder."""
    folder = path_of(folder)
    places = [place for place in (folder, folder / kind) if (place / "model.json").is_file()]
    return any(_read(place).kind == kind for place in places)


def _read(folder):
    path = folder / "model.json"
    try:
        return _parsed(folder, codec.read_json(path, finite=False))  # what is not finite is refused by its field
    except Untrusted as error:
        raise Untrusted(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no model description: {error}") from error


def _parsed(folder, content):
    """The model that a description speaks of; everything that commands use of it is looked at."""
    if not isinstance(content, dict):
        raise ValueError(f"it is {codec.shown(content)}, not an object with a format")
    if content.get("format") != FORMAT or content["format"] is True:
        raise ValueError(f"format is {codec.shown(content.get('format'))}, not {FORMAT}, the one this version reads")
    if missing := {"kind", "module", "info", "settings"} - content.keys():
        raise ValueError(f"{min(missing)} is missing")
    kind, settings, hints = content["kind"], content["settings"], content.get("code", {})
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind is {codec.shown(kind)}; it must be one of {tuple(KINDS)}")
    if not isinstance(hints, dict):
        raise ValueError(f"code is {codec.shown(hints)}; it must be paths by the names of modules")
    module = codec.decode(content["module"], nn.Module, "module", hints)
    if lacks := [name for name in KINDS[kind] if not hasattr(type(module), name)]:
        raise ValueError(f"module is a {type(module).__name__}, which is no {kind}: it has no {lacks[0]}")
    info = codec.build(Info, content["info"], "info")
    if info.class_names and len(info.class_names) != info.classes:
        raise ValueError(f"info.class_names are {len(info.class_names)}, but info.classes is {info.classes}")
    if not isinstance(settings, dict):
        raise ValueError(f"settings is {codec.shown(settings)}; it must be an object")
    for name, kinds in (("tokenizer", str), ("measured", str), ("order", OrderFn)):
        if name in settings:
            codec.decode(settings[name], kinds, f"settings.{name}", hints)
    if not isinstance(settings.get("sampling", {}), dict):
        raise ValueError(f"settings.sampling is {codec.shown(settings['sampling'])}; it must be an object")
    if "data" in settings:
        codec.build(Data, settings["data"], "settings.data")
    if isinstance(settings.get("origin", ""), str):  # the folder of a tokenizer that a run took as it was
        codec.decode(settings.get("origin", ""), str, "settings.origin")
    else:
        codec.build(Origin, settings["origin"], "settings.origin")
    model = Model(folder, kind, module, info, settings)
    if kind == "tokenizer":
        _built("module.spec", lambda: module.spec)
        return model
    if module.spec is None:
        raise ValueError("module.spec is missing; a generator knows its tokens")
    sampling = model.sampling
    for codes in module.spec.codes:
        logits = jax.ShapeDtypeStruct((1, codes), jnp.float32)
        _built("settings.sampling.filter", lambda logits=logits: jax.eval_shape(sampling.filter, logits))
    fitting = codec.encode(_built("module", lambda: module.complete(module.spec, info)))
    if found := codec.difference(codec.encode(module), fitting, "module", ("there", "by module.spec and info")):
        raise ValueError(found)
    return model


def _built(where, make):
    try:
        return make()
    except Exception as error:  # whatever modules of senseless fields raise
        raise ValueError(f"{where}: {words.reason(error)}") from error
