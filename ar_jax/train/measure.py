"""Mean and spread of a continuous tokenizer's latents, measured once it is trained and kept with it."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from ar_jax.data import Data, Source, batches
from ar_jax.files.images import to_float
from ar_jax.files.models import Model, describe, open_model
from ar_jax.machine.distributed import say
from ar_jax.tokens import sides
from ar_jax.typing import Batch, Params

IMAGES = 2048  # that are looked at, drawn as in training
BATCH = 64


def measured(model: Model, module: nn.Module, source: Source, data: Data, seed: int) -> Model:
    """The tokenizer with what was measured of its latents, written to its `model.json`.

    Nothing is done to tokenizers that measure nothing, to those whose config gives the numbers, and to those measured
    since their last update. Every process looks at the same images.

    Args:
      model: with its parameters.
      module: as the config has it.
      source, data: it was trained on.
      seed: of the images' order.
    """
    fields = getattr(module, "MEASURED", ())
    if not fields or any(getattr(module, name) for name in fields):
        return model
    trained = model.fixed().checkpoint
    if model.settings.get("measured") == trained:
        return model
    stream = batches(source, data, batch=BATCH, seed=seed)
    shift, scale = moments(model.module, model.params(), (next(stream) for _ in range(IMAGES // BATCH)))
    say(f"tokenizer: latents of {IMAGES} images have means {min(shift):.3g}..{max(shift):.3g} and standard deviations "
        f"{1 / max(scale):.3g}..{1 / min(scale):.3g}")  # fmt: skip
    module = model.module.clone(shift=shift, scale=scale)
    return describe(model.folder, model.kind, module, model.info, model.settings | {"measured": trained})


def moments(module: Any, params: Params, some: Iterable[Batch]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and inverse standard deviation of every channel of a tokenizer's latents, to five digits.

    Args:
      some: batches with "image", uint8 [b h w 3].
    """
    raw, parts = module.clone(shift=(), scale=()), math.prod(sides(module.patch))
    method = getattr(module, "measures", "encode")  # codes are measured before they are

    @jax.jit
    def sums(params, image, key):
        x = raw.apply({"params": params}, to_float(image), key=key, method=method)
        x = x[:, -math.prod(module.grid) :]  # of a pyramid the last scale, as others are averages of it
        x = x.reshape(*x.shape[:2], -1, parts)  # a token's numbers lie channel by channel
        return x.mean((0, 1, 3)), (x**2).mean((0, 1, 3))

    found = [
        sums(params, batch["image"], jax.random.fold_in(jax.random.key(0), i)) for i, batch in enumerate(some)
    ]  # fmt: skip
    mean, square = np.asarray(jax.device_get(found), np.float64).mean(0)
    scale = 1 / np.sqrt(np.maximum(square - mean**2, 1e-12))
    return tuple(tuple(float(f"{x:.5g}") for x in side) for side in (mean, scale))


def inherited(module: nn.Module, kind: str, start: str | Path, parts: Iterable[tuple[str, str]]) -> nn.Module:
    """A network whose parts bring what was measured of those that they begin as, unless the config says it.

    Args:
      module: as the config has it.
      kind: "tokenizer" or "generator".
      start, parts: see `config.Stage`.
    """
    if parts or start:
        whole = open_model(start, kind).module if start else None
        begun = {name: getattr(whole, name, None) for name in module.__dataclass_fields__}
        for name, other in (begun | {name: open_model(folder, kind).module for name, folder in parts}).items():
            part = getattr(module, name, None)
            empty = [field for field in getattr(part, "MEASURED", ()) if not getattr(part, field)]
            if empty and type(other) is type(part):
                module = module.clone(**{name: part.clone(**{field: getattr(other, field) for field in empty})})
    return module


def remembered(module: nn.Module, settings: dict, old: Model) -> tuple[nn.Module, dict]:
    """A config's tokenizer and the settings of its folder, with what was measured in an earlier start of the same run."""
    fields = getattr(module, "MEASURED", ())
    if "measured" not in old.settings or type(old.module) is not type(module) or not fields:
        return module, settings
    if any(getattr(module, name) for name in fields):
        return module, settings
    module = module.clone(**{name: getattr(old.module, name) for name in fields})
    return module, settings | {"measured": old.settings["measured"]}
