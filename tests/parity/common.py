"""What parity modules share: folders whose entries note that they were read, layouts, and every use of the sampling interfaces.

Each other file of this folder computes one or more fixture folders: its CASES are {folder: Folder -> {output: array}}.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from ar_jax.convert.names import to_params, to_weights
from ar_jax.convert.sources import param_shapes
from ar_jax.decode.guidance import Interval, Linear, Ramp
from ar_jax.decode.logits import Filter
from ar_jax.decode.sampling import Sampling
from ar_jax.decode.sequential import Sequential, Task
from ar_jax.decode.temperature import Constant, KnownScales
from ar_jax.generators.base import Knobs, Setting, Step
from ar_jax.nets.conditioning import Cond, paired
from ar_jax.orders import Order, scan_steps
from ar_jax.typing import Batch, Params

# What no output depends on, and why; every other entry of a folder has to be read.
EXEMPT = {
    **dict.fromkeys(("batch", "labels"), "the inputs show it"),
    **dict.fromkeys(("sample_iters", "iters", "steps", "up", "lo", "const", "cfg_w"), "cases give it as an argument"),
    **dict.fromkeys(("diff_upper_steps", "diff_lower_steps"), "cases give it as an argument"),
    **dict.fromkeys(("class_dropout_prob", "cond_drop_rate", "drop_labels_probability"), "dropped labels are an input"),
    **dict.fromkeys(("mask_ratio", "mask_ratio_min", "example_mask_ratio"), "masks are an input"),
    **dict.fromkeys(("malib_ckpt", "scan"), "how the reference stores its parameters"),
    "multiple_of": "what the hidden width is rounded to, which is given",
    "mode": "what the function's name says",
    "conditional_logits": "the name of an output",
}


class Noted(Mapping):
    """Entries that note when they are read; entries that are mappings are such again."""

    def __init__(self, entries: Mapping[str, Any]):
        self.entries = {key: Noted(value) if isinstance(value, dict) else value for key, value in entries.items()}
        self.read = set()

    def __getitem__(self, key: str) -> Any:
        value = self.entries[key]
        self.read.add(key)
        return value

    def __contains__(self, key: object) -> bool:  # which is no reading
        return key in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def unread(self) -> list[str]:
        found = []
        for key, value in self.entries.items():
            if isinstance(value, Noted):
                found += [f"{key}.{inner}" for inner in value.unread()]
            elif key not in self.read and key not in EXEMPT:
                found.append(key)
        return found


@dataclasses.dataclass(frozen=True)
class Case:
    """One test of a folder: a function, its inputs, outputs and fixed arguments; and its number."""

    number: int
    function: str
    inputs: list[str]
    outputs: list[str]
    arguments: Noted


class Folder:
    """A fixture folder.

    Attributes:
      h: its hyperparameters.
      cases: its tests.
      io: its input arrays.
      files: state dicts by file.
      arrays: what meta.json says of every array.
      want: the output arrays.
    """

    def __init__(self, path: pathlib.Path):
        meta = json.loads((path / "meta.json").read_text())
        self.path, self.arrays = path, meta["arrays"]
        self.h, self.file_names = Noted(meta["hyperparameters"]), [entry["file"] for entry in meta["weights"]]
        self.cases = [
            Case(i, case["function"], case["inputs"], case["outputs"], Noted(case.get("arguments", {})))
            for i, case in enumerate(meta["cases"])
        ]

    @functools.cached_property
    def files(self) -> dict[str, Noted]:
        return {file: Noted(load_file(self.path / file)) for file in self.file_names}

    @functools.cached_property
    def io(self) -> Noted:
        return Noted(self._arrays("input"))

    @functools.cached_property
    def want(self) -> dict[str, np.ndarray]:
        return self._arrays("output")

    def _arrays(self, role):
        stored = load_file(self.path / "io.safetensors")
        return {name: stored[name] for name, array in self.arrays.items() if array["role"] == role}

    @property
    def weights(self) -> Noted:
        return self.files["weights.safetensors"]

    def of(self, function: str) -> list[Case]:
        """The cases of a function, whose name may go on."""
        return [case for case in self.cases if case.function.startswith(function)]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.arrays[name]["shape"])

    def outputs(self, prefix: str) -> list[str]:
        """What follows a prefix in the names of the outputs."""
        return [name.removeprefix(prefix) for name in self.want if name.startswith(prefix)]

    def unread(self) -> list[str]:
        """Everything nobody has read, in words."""
        left = [f"hyperparameter {name}" for name in self.h.unread()]
        for case in self.cases:
            left += [f"argument {name} of case {case.number}, {case.function}" for name in case.arguments.unread()]
        left += [f"key {key} of {file}" for file, weights in self.files.items() for key in weights.unread()]
        return left + [f"input {name}" for name in self.io.unread()]


def made(name: str, h: Mapping, weights: Mapping, io: Mapping, cases: tuple = (), **shapes: tuple[int, ...]) -> Folder:
    """A folder that lies nowhere: of hyperparameters, weights and inputs, and the shapes of outputs that are looked at."""
    folder = object.__new__(Folder)
    folder.path, folder.h, folder.io, folder.cases = pathlib.Path(name), Noted(h), Noted(io), cases
    folder.files, folder.arrays = {"weights.safetensors": Noted(weights)}, {k: {"shape": v} for k, v in shapes.items()}
    return folder


def fixed(entries: Mapping[str, Any], **values: Any) -> None:
    """Entries of a folder that the library has one value of, or that say again what is known."""
    for name, value in values.items():
        if name in entries:
            found = entries[name]
            assert found == value, f"{name} is {found}, but the library has {value}"


def nchw(x):
    return jnp.moveaxis(jnp.asarray(x), -1, 1)


def nhwc(x):
    return jnp.moveaxis(jnp.asarray(x), 1, -1)


def loaded(module: nn.Module, weights: Mapping[str, np.ndarray], family: ModuleType) -> tuple[Params, Callable]:
    """Parameters from a state dict, which holds nothing else but the family's buffers; and the module's methods on them."""
    shapes = param_shapes(module)
    known = getattr(family, "buffers", lambda *_: {})(module, {key: np.shape(value) for key, value in weights.items()})
    buffers = known.keys() & weights.keys()
    kept = {key: weights[key] for key in buffers}
    params = to_params(weights, shapes, family.rules(module), kept)
    params = jax.tree.map(jnp.asarray, params)
    return params, functools.partial(module.apply, {"params": params})


class Asked:
    """Of gradients, those that outputs are named after: a compiled function that returns no others computes no others.

    `of` picks them, in a jitted function; `named` gives them the family's names.
    """

    def __init__(self, params: Params, rules: list, keys: list[str]):
        self.shapes, self.tree = jax.tree.flatten(jax.eval_shape(lambda x: x, params))
        self.rules, self.keys = rules, keys
        numbers = [np.full(leaf.shape, i, np.int32) for i, leaf in enumerate(self.shapes)]
        theirs = to_weights(self.tree.unflatten(numbers), rules)
        self.wanted = sorted({int(i) for key in keys for i in np.unique(theirs[key])})

    def of(self, grads: Params) -> list:
        return [leaf for i, leaf in enumerate(jax.tree.leaves(grads)) if i in self.wanted]

    def named(self, found: list) -> dict[str, np.ndarray]:
        leaves = [np.zeros(leaf.shape, np.float32) for leaf in self.shapes]
        for i, leaf in zip(self.wanted, found):
            leaves[i] = leaf
        theirs = to_weights(self.tree.unflatten(leaves), self.rules)
        return {key: theirs[key] for key in self.keys}


def with_head(generator: nn.Module, **fields: Any) -> nn.Module:
    return generator.clone(head=generator.head.clone(**fields))


# Noise that is given ----------------------------------------------------------------------------------------


class Given:
    """Takes noise from a table [images ranks 1+steps c]; a key's two words are image and rank."""

    def noise(self, keys, s):
        image, rank = jnp.moveaxis(jax.random.key_data(keys), -1, 0)
        return jnp.asarray(self.table)[image, rank, s]


def numbered(images, ranks):
    """Keys for `Given`, [b m]."""
    image, rank = jnp.broadcast_arrays(jnp.arange(images)[:, None], jnp.asarray(ranks)[None])
    return jax.random.wrap_key_data(jnp.stack([image, rank], -1).astype(jnp.uint32))


# The sampling interfaces, which are used nowhere else in this folder -----------------------------------------


def constant_knobs(guidance: Any, temperature: float = 1.0) -> Knobs:
    """One weight per step, and one temperature for all."""
    guidance = np.asarray(guidance, np.float32)
    return Knobs(guidance, np.full(len(guidance), temperature, np.float32))


def weights_of(rule: str, scale: float, order: Order, last: int = -1) -> np.ndarray:
    """Guidance of every step of an order: "linear" (MAR), "ramp" (VAR), or "constant" up to the step `last`."""
    rules = {"linear": Linear(scale), "ramp": Ramp(scale), "constant": Interval(scale, last)}
    return rules[rule](order, None)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A generator, its tokenizer and knobs, as settings of next-scale sampling arrange them."""

    generator: nn.Module
    tokenizer: nn.Module
    order: Order
    knobs: Knobs
    guided: bool


def by_settings(
    generator: nn.Module, tokenizer: nn.Module, order: Callable, *, guidance: float, ramp: bool = True, reach: int = 0,
    temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, scales: tuple = (), largest: int = 0,
) -> Drawn:  # fmt: skip
    sampling = Sampling(
        Ramp(guidance, reach, largest) if ramp else Interval(guidance),
        KnownScales(temperature, largest) if largest else Constant(temperature),
        Filter(top_k, top_p),
        fields=(("tokenizer.scales", scales),) if scales else (),
    )
    generator, tokenizer, order = sampling.adapted(generator, tokenizer, order)
    order = order(generator.spec)
    knobs = sampling.knobs(order, generator.spec)
    return Drawn(generator, tokenizer, order, knobs, bool((knobs.guidance != 1).any()))


def guided_rows(generator: nn.Module, params: Params, batch: Batch, guided: bool = True) -> Cond:
    """The condition of every image, beside that without it if they are guided."""
    images = len(next(iter(batch.values())))
    rows = functools.partial(generator.apply, {"params": params}, batch, method="condition")
    cond = rows(jnp.zeros(images, bool))
    return paired(cond, rows(jnp.ones(images, bool))) if guided else cond


def draws(
    generator: nn.Module, params: Params, batch: Batch, order: Callable, knobs: Knobs, guided: bool,
    tokenizer: nn.Module | None = None, frozen: Params | None = None,
) -> np.ndarray:  # fmt: skip
    """Tokens of the library's own sampler, in slot order; `frozen` are the tokenizer's parameters."""
    keys = jax.random.split(jax.random.key(0), len(next(iter(batch.values()))))
    return np.asarray(_sampler(generator, order, guided, tokenizer)(params, frozen, batch, knobs, keys))


@functools.cache
def _sampler(generator, order, guided, tokenizer):
    @jax.jit
    def run(params, frozen, batch, knobs, keys):
        laid_out, params = generator.unrolled(params)
        call = tokenizer and functools.partial(tokenizer.apply, {"params": frozen})
        order_of = order(generator.spec)
        return Sequential()(Task(laid_out, params, batch, order_of, knobs, keys, guided, call))[0]

    return run


def begin(module: nn.Module, setting: Setting, images: int) -> Any:
    """The state before the first step of a bound generator, with room for all ranks."""
    return module.grow(module.begin(setting, images), setting.order.n, setting)


def step_of(module: nn.Module, state: Any, i: Any, first: Any, keys: Any, setting: Setting) -> Any:
    """One step of a bound generator."""
    return module.step(state, Step(i, first, keys), setting)


def from_noise(
    generator: nn.Module, params: Params, cond: Cond, order: Order, knobs: Knobs, images: int, tokenizer: Any = None
):
    """Tokens in rank order of the library's steps, with `Given` noise."""  # fmt: skip
    call, n, setting = (
        functools.partial(generator.apply, {"params": params}),
        order.n,
        Setting(cond, order, knobs, tokenizer),
    )

    def step(state, i, first, size):
        keys = numbered(images, jnp.minimum(first + jnp.arange(size), n - 1))
        return call(state, i, first, keys, setting, method=step_of)

    grow = lambda state, ranks: call(state, ranks, setting, method="grow")  # noqa: E731
    state = call(setting, images, method="begin")
    return scan_steps(order.sizes, step, state, rooms=order.rooms, grow=grow).tokens


def along(
    generator: nn.Module, params: Params, batch: Batch, order: Callable, tokens: Any, readout: Callable, *,
    guided: bool = True, tokenizer: nn.Module | None = None, frozen: Params | None = None,
) -> np.ndarray:  # fmt: skip
    """Readouts [B n ...] of the cached steps along given tokens [b n k]: conditional rows first, then those without.

    Args:
      readout: bound generator, hidden rows -> their readouts.
    """
    rows = np.asarray(
        _stepper(generator, order, readout, guided, tokenizer)(params, frozen, batch, jnp.asarray(tokens))
    )
    return by_way(rows) if guided else rows


@functools.cache
def _stepper(generator, order_of, readout, guided, tokenizer):
    order = order_of(generator.spec)

    @jax.jit
    def run(params, frozen, batch, tokens):
        laid_out, params = generator.unrolled(params)
        frozen = tokenizer and functools.partial(tokenizer.apply, {"params": frozen})
        call = functools.partial(laid_out.apply, {"params": params})
        cond = guided_rows(laid_out, params, batch, guided)
        setting = Setting(cond, order, constant_knobs(np.ones(len(order.sizes))), frozen)
        state = call(setting, len(tokens), method="begin").replace(tokens=tokens)

        def row(self, state, first, size):
            h, cache = self.rows(state, first, size, setting)
            return readout(self, h), state.replace(cache=cache)

        if set(order.sizes) == {1}:
            state = call(state, order.n, setting, method="grow")

            def one(state, rank):
                out, state = call(state, rank, 1, method=row)
                return state, out[:, 0]

            return jnp.moveaxis(jax.lax.scan(one, state, jnp.arange(order.n))[1], 0, 1)
        parts, first = [], 0
        for size in order.sizes:
            state = call(state, first + size, setting, method="grow")
            out, state = call(state, first, size, method=row)
            parts.append(out)
            first += size
        return jnp.concatenate(parts, axis=1)

    return run


def logits(generator: nn.Module, h: Any) -> Any:
    """Of hidden rows; of a bound generator."""
    return generator.head(h)


def by_way(x):
    """Guided rows as neighbours to conditional ones first."""
    return np.concatenate([x[0::2], x[1::2]])
