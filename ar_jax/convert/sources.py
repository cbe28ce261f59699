"""The families of released checkpoints.

A family is a module with these names, and a line in `SOURCES`:

    FIXED        keys of parameters that are not trained
    recognise    shapes by key -> "tokenizer", "generator" or ""
    build        kind, shapes, and what files do not hold -> the network
    buffers      (may be left out) network, shapes by key -> {key: shape} of entries that are no part of it; zeros where they are
                 not known
    describe     network -> a sentence, the `Info` of its data, settings of its model folder
    rules        network -> the rules that name its parameters (`names.Rule`)
    fills        (may be left out) network -> {key: array}, contents of its buffers that are not zero
    spelled      (may be left out) entries by key -> the same by the names that `rules` gives, if the family has other spellings
    TWICE        (may be left out) {key: another key}, entries that files have under two names; the first is a buffer
    AVERAGED     (may be left out) kinds of which the authors evaluate the moving average
    BESIDE       (may be left out) what names of entries begin with that lie beside the network: losses, another network
    BEFORE       (may be left out) a word before all names of its generators, which files may leave out
"""

import functools
import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from ar_jax.convert import (
    binary_latent,
    dar,
    detailflow,
    dqvae,
    elm,
    flashar,
    flextok,
    flexvar,
    flowar,
    fqgan,
    fractal,
    gigatok,
    halton,
    himar,
    hita,
    ibq,
    infinity,
    instella,
    lightgen,
    llamagen,
    mar,
    maskgit,
    meissonic,
    nar,
    next_scale,
    open_magvit2,
    rar,
    titok,
    tokenbridge,
    var,
    vf_prompt,
    vq_diffusion,
    vqgan_lc,
    xar,
)
from ar_jax.convert.names import Rule, differences, key_shapes
from ar_jax.files import words
from ar_jax.tokenizers.dimensionwise import Dimensionwise
from ar_jax.typing import Params

SOURCES: dict[str, ModuleType] = {
    "detailflow": detailflow,
    "fractal": fractal,
    "titok": titok,
    "infinity": infinity,
    "instella": instella,
    "binary_latent": binary_latent,
    "vq_diffusion": vq_diffusion,
    "halton": halton,
    "dqvae": dqvae,
    "var": var,
    "flexvar": flexvar,
    "next_scale": next_scale,
    "gigatok": gigatok,
    "hita": hita,
    "open_magvit2": open_magvit2,
    "fqgan": fqgan,
    "ibq": ibq,
    "vqgan_lc": vqgan_lc,
    "flextok": flextok,
    "elm": elm,
    "flashar": flashar,
    "nar": nar,
    "llamagen": llamagen,
    "vf_prompt": vf_prompt,
    "dar": dar,
    "flowar": flowar,
    "xar": xar,
    "tokenbridge": tokenbridge,
    "lightgen": lightgen,
    "mar": mar,
    "himar": himar,
    "rar": rar,
    "maskgit": maskgit,
    "meissonic": meissonic,
}  # the special before the general

Shapes = Mapping[str, tuple[int, ...]]


class Found(NamedTuple):
    """A network that has a released form.

    Attributes:
      family: its name in `SOURCES`.
      kind: "tokenizer" or "generator".
      module: the network.
      params: its tree of shapes.
      rules: names of its parameters in the family's files.
      keys: shapes by the family's keys, buffers aside.
      buffers: shapes of the entries a released file has beside the parameters.
      strays: keys of single numbers (steps, decays) that a file has beside both.
    """

    family: str
    kind: str
    module: nn.Module
    params: Params
    rules: list[Rule]
    keys: Shapes
    buffers: Shapes
    strays: tuple[str, ...] = ()

    @property
    def source(self) -> ModuleType:
        return SOURCES[self.family]

    @property
    def trained(self) -> int:
        """How many numbers are trained."""
        return sum(math.prod(shape) for key, shape in self.keys.items() if key not in self.source.FIXED)


def identify(
    shapes: Shapes, *, size: int = 0, heads: int = 0, groups: int = 0, scales: tuple[int, ...] = (), family: str = ""
) -> Found:
    """The network of a file, from the shapes of all its entries; every one of them has to fit.

    Args:
      size: of the images in pixels; 0 if unknown.
      heads: of the attention; 0 takes the published number.
      groups: of the group norms; 0 takes the published number.
      scales: of the token pyramid; () takes the published ones of the size.
      family: the one that the file is of; "" is the first that knows its names.
    Raises:
      ValueError: the file is not known or is damaged; the first differing key is named.
    """
    if family and family not in SOURCES:
        raise ValueError(f"--family is {family!r}; it must be one of {', '.join(SOURCES)}")
    (source, kind), wanted = recognised(shapes, family), family
    family = next((name for name, known in SOURCES.items() if known is source), "")
    if not family:
        some = ", ".join(f"{words.name(key)} {list(shape)}" for key, shape in list(shapes.items())[:3])
        known = f"the family {wanted}" if wanted else f"a known family ({', '.join(SOURCES)})"
        raise ValueError(f"not a checkpoint of {known}; its {len(shapes)} entries begin with {some}")
    refusal, asked = f"looks like a {kind} of {family}, but ", _Asked(shapes)
    if (empty := next((key for key, shape in shapes.items() if 0 in shape), None)) is not None:
        raise ValueError(f"{refusal}{words.name(empty)} has shape {tuple(shapes[empty])}: there is nothing in it")
    try:
        module = SOURCES[family].build(kind, asked, size=size, heads=heads, groups=groups, scales=scales)
    except KeyError as error:
        raise ValueError(f"{refusal}{words.name(str(error.args[0]))} is missing") from error
    except Exception as error:
        if isinstance(error, ValueError) and "unpack" not in str(error):
            raise ValueError(f"{refusal}{words.reason(error)}") from error
        shape = tuple(shapes[asked.last]) if asked.last in shapes else ()
        raise ValueError(f"{refusal}{asked.last} has shape {shape}, which no such network has") from error
    try:
        found = _named(family, kind, module, shapes)
    except Exception as error:  # whatever a network of senseless sizes raises
        raise ValueError(f"{refusal}its network cannot be built: {words.reason(error)}") from error
    buffers = {key: shape for key, shape in found.buffers.items() if key in shapes}
    strays = tuple(key for key, shape in shapes.items() if shape == () and key not in {**found.keys, **buffers})
    if difference := differences({**found.keys, **buffers}, {k: v for k, v in shapes.items() if k not in strays}):
        raise ValueError(f"{refusal}{difference}")
    return found._replace(strays=strays)


def recognised(shapes: Shapes, family: str = "") -> tuple[ModuleType | None, str]:
    """The family whose names a file has, by a few of them, and the kind; None if there is none. One may be asked for."""
    for source in [SOURCES[family]] if family else SOURCES.values():
        if kind := source.recognise(shapes):
            return source, kind
    return None, ""


def spelled(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a file under the names that its family's rules give."""
    source, _ = recognised({key: value.shape for key, value in weights.items()})
    return source.spelled(weights) if hasattr(source, "spelled") else dict(weights)


class _Asked(dict):
    """Shapes by key that remember which one was asked for last: it is the one that something is wrong with."""

    last = ""

    def __getitem__(self, key):
        self.last = key
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.last = key
        return super().get(key, default)


def export(module: nn.Module, kind: str, family: str = "") -> Found:
    """The released form of a network.

    Args:
      family: the one it came from; else the first that knows such a network.
    Raises:
      ValueError: no family has such a network.
    """
    reasons, module = [], module.base if isinstance(module, Dimensionwise) else module  # which has no parameters
    for name in [family] if family else SOURCES:
        try:
            return _named(name, kind, module, {})
        except (KeyError, ValueError) as error:
            reasons.append(f"{name}: {error}")
    raise ValueError(f"this {type(module).__name__} has no released form; {'; '.join(reasons)}")


@functools.lru_cache(maxsize=256)
def param_shapes(module: nn.Module) -> Params:
    """Shapes of a network's parameters; it is traced once, however often it is asked for."""
    return jax.eval_shape(module.init_params, jax.random.key(0))


def _named(family, kind, module, shapes):
    rules = SOURCES[family].rules(module)
    params = param_shapes(module)
    buffers = SOURCES[family].buffers(module, shapes) if hasattr(SOURCES[family], "buffers") else {}
    return Found(family, kind, module, params, rules, key_shapes(params, rules), buffers)
