"""How images are drawn, as one value made of parts: what a config says, a model folder keeps and a command changes."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from ar_jax.decode.edit import Edit, Source, hold
from ar_jax.decode.glimpse import glimpse, previews
from ar_jax.decode.guidance import Interval, Linear, Ramp
from ar_jax.decode.logits import Filter
from ar_jax.decode.sequential import Account, Sequential, Task
from ar_jax.decode.temperature import Constant, KnownScales
from ar_jax.files import codec
from ar_jax.generators.base import Frozen, Knobs
from ar_jax.machine.flops import with_fields
from ar_jax.orders import Order, OrderFn
from ar_jax.tokenizers.conditioned import said_of
from ar_jax.tokens import MOST, TokenSpec
from ar_jax.typing import Array, Batch, Float, Key, Params, Tokens


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How images are drawn. Every part is a frozen dataclass in the file of its idea; other ones fit as well."""

    guidance: Callable = Interval()
    """Weight of the condition in every step (`decode.guidance`)."""
    temperature: Callable = Constant()
    """How freely every step draws (`decode.temperature`)."""
    filter: Callable = Filter()
    """Which codes may be drawn (`decode.logits`)."""
    decoder: Callable = Sequential()
    """The loop that draws them (`decode.sequential`, `decode.jacobi`, `decode.search`)."""
    soft: bool = False
    """Mixtures of codes instead of codes, as VAR's more_smooth: smoother pictures, no better figures."""
    fields: tuple[tuple[str, Any], ...] = ()
    """Fields of the model that are changed while sampling, such as (("order.steps", 64), ("tokenizer.scales", (1, 2, 4))):
    those that its tokenizer, generator and order call `adjustable`."""

    def __post_init__(self):
        for name in ("guidance", "temperature", "filter", "decoder"):
            if not callable(part := getattr(self, name)):
                own = type(self).__dataclass_fields__[name].default
                raise ValueError(f"sampling.{name} is {part!r}, which is no part of sampling; give one such as {own!r}")

    def adapted(self, generator: Any, tokenizer: Any, order: OrderFn) -> tuple[Any, Any, OrderFn]:
        """Generator, tokenizer and order with the changed fields.

        Raises:
          ValueError: a field that this model does not have, or that cannot be changed without training.
        """
        model = {"generator": generator, "tokenizer": tokenizer, "order": order}
        found = adjustable(**model)
        if unknown := [name for name, _ in self.fields if name not in found]:
            raise ValueError(
                f"{unknown[0]} cannot be changed in sampling; of this model these can: {', '.join(found) or 'none'}"
            )
        by_owner: dict[str, dict[str, Any]] = {}
        for name, value in self.fields:
            owner, _, field = name.rpartition(".")
            by_owner.setdefault(owner, {})[field] = value
        for owner, values in by_owner.items():
            name, *inside = owner.split(".")
            model[name] = _adjusted(model[name], inside, values)
        if "tokenizer" in by_owner:
            model["generator"] = model["generator"].on(model["tokenizer"].spec)
        return model["generator"], model["tokenizer"], model["order"]

    def knobs(self, order: Order, spec: TokenSpec) -> Knobs:
        """What each step of an order is drawn with."""
        steps = len(order.sizes)
        progress = np.arange(steps, dtype=np.float32) / max(steps - 1, 1)
        return Knobs(
            self.guidance(order, spec), self.temperature(order, spec), self.filter, progress if self.soft else None
        )

    def tokens(
        self,
        generator: Any,
        params: Params,
        batch: Batch,
        order: Order,
        *,
        tokenizer: Frozen | None = None,
        keys: Key[Array, "b"],
        source: Source | None = None,
        **more: Any,
    ) -> tuple[Tokens, Account]:
        """Draws tokens in slot order; see `Task`."""
        given = {"tokenizer": tokenizer, "keys": keys, "source": source, **more}
        return self.decoder(self.task(generator, params, batch, order, **given))

    def weights(self) -> Params | None:
        """What the decoder needs beside the model (parameters of a judge), to be given to `images` as `extra`; None if nothing."""
        return self.decoder.weights() if hasattr(self.decoder, "weights") else None

    def task(self, generator: Any, params: Params, batch: Batch, order: Order, **more: Any) -> Task:
        """What the decoder is asked to do; arguments as of `tokens`."""
        knobs = self.knobs(order, generator.spec)
        guided = bool((np.asarray(knobs.guidance) != 1).any())
        return Task(generator, params, batch, order, knobs, guided=guided, **more)

    def images(
        self,
        generator: Any,
        tokenizer: Any,
        params: Params,
        tokenizer_params: Params,
        batch: Batch,
        order: Order,
        *,
        keys: Key[Array, "b"],
        edit: Edit | None = None,
        pixels: Any = None,
        decoded: bool = True,
        preview: int = 0,
        extra: Any = None,
    ) -> tuple[Float[Array, "b h w c"] | Float[Array, "b p h w c"] | Tokens, Account]:
        """Draws tokens with a generator, all or those that an edit leaves free, and decodes them.

        Args: as of `tokens`, and
          pixels: dtype of the tokenizer's layers in decoding, where its images are float32 still; None is their own.
          decoded: False gives the tokens, for tokenizers that decode on the host (`tokenizers.host`).
          preview: at most so many pictures of every image in the making, the last of them the image (`glimpse.previews`);
            0 gives the image alone.
          extra: what `weights` gave.
        """
        shown, source = tokenizer if pixels is None else with_fields(tokenizer, dtype=pixels), None

        def frozen(*arguments, method, **keywords):
            module = shown if method in ("decode", "decode_until", "prefix", "partly") else tokenizer
            keywords |= said_of(tokenizer, batch, len(arguments[0])) if method == "decode" else {}
            return module.apply({"params": tokenizer_params}, *arguments, method=method, **keywords)

        if edit is not None:
            source, frozen = hold(tokenizer, frozen, edit)
        look = looking(tokenizer, frozen, keys) if decoded else None
        given = {"tokenizer": frozen, "keys": keys, "source": source, "look": look, "extra": extra}
        if preview:
            return previews(self.decoder, self.task(generator, params, batch, order, **given), preview)
        tokens, account = self.tokens(generator, params, batch, order, **given)
        if not decoded:
            return tokens, account
        noise = {"key": decoding_keys(keys)} if getattr(tokenizer, "generative", False) else {}
        return frozen(tokens, method="decode", **noise), account


def decoding_keys(keys: Key[Array, "b"]) -> Key[Array, "b"]:
    """Of tokenizers whose decoders draw: from the images' keys, a number that no rank has."""
    return jax.vmap(lambda key: jax.random.fold_in(key, MOST))(keys)


def looking(tokenizer: Any, frozen: Frozen, keys: Key[Array, "b"]) -> Callable[[Tokens, Array], Array]:
    """What `Task.look` is: tokens in slot order and which are known to images. Candidates of an image are neighbours, and a
    decoder that draws draws alike for all of them."""

    def look(tokens, known):
        each = np.arange(len(tokens)) // (len(tokens) // len(keys))
        return glimpse(tokenizer, frozen, tokens, known, decoding_keys(keys)[each])

    return look


def adjustable(**model: Any) -> dict[str, Any]:
    """What can be changed without training: values by name, such as "generator.head.steps".

    A module, an order or a tokenizer names these fields in its class attribute `adjustable`; those of parts inside it
    belong to it.
    """
    found = {}
    for name, part in model.items():
        if not dataclasses.is_dataclass(part) or isinstance(part, type):
            continue
        found |= {f"{name}.{field}": getattr(part, field) for field in getattr(part, "adjustable", ())}
        inside = [
            field.name for field in dataclasses.fields(part) if field.init and field.name not in ("parent", "name")
        ]
        found |= adjustable(**{f"{name}.{field}": getattr(part, field) for field in inside})
    return found


def _adjusted(part: Any, inside: list[str], values: dict[str, Any]) -> Any:
    if inside:
        values = {inside[0]: _adjusted(getattr(part, inside[0]), inside[1:], values)}
    elif hasattr(part, "adjusted"):
        return part.adjusted(**values)
    return dataclasses.replace(part, **values)


def read_sampling(written: Mapping[str, Any], generator: Any = None) -> Sampling:
    """The value that a model folder keeps; folders of earlier versions keep a flat list of settings.

    Args:
      written: from `codec.encode`, or of an earlier version.
      generator: whose settings they are.
    Raises:
      ValueError: settings that this version does not know, or that are none.
    """
    if "type" not in written:
        written = _parts(dict(written), "generator" if hasattr(generator, "anneal") else "generator.head")
    return codec.decode(dict(written), Sampling, "settings.sampling")


def _parts(flat, inner):
    """Settings of versions before there were parts, as those of this one; `inner` has the denoising steps."""

    def part(kind, **fields):
        given = {field: flat.pop(name) for field, name in fields.items() if name in flat}
        return {"type": f"{kind.__module__}:{kind.__qualname__}", **given}

    rule, largest, known = flat.pop("guidance_rule", "interval"), flat.pop("largest", 0), flat.pop("known", [])
    if rule == "ramp":
        guidance = part(Ramp, weight="guidance", reach="guidance_reach") | {"largest": largest}
    elif rule in ("interval", "linear"):
        more = {"last": "guidance_last"} if rule == "interval" else {}
        guidance = part(Interval if more else Linear, weight="guidance", **more)
    else:
        raise ValueError(f"settings.sampling.guidance_rule is {codec.shown(rule)}; it must be interval, ramp or linear")
    temperature = part(KnownScales if largest or known else Constant, value="temperature")
    temperature |= {"largest": largest, "known": known} if largest or known else {}
    kept = part(Filter, top_k="top_k", top_p="top_p", banned="banned")
    names = {
        "scales": "tokenizer.scales", "refine": "generator.refine", "anneal": f"{inner}.anneal",
        "inner_steps": f"{inner}.steps", "last_inner_steps": f"{inner}.last_steps",
    }  # fmt: skip
    fields = [[field, value] for name, field in names.items() if (value := flat.pop(name, None))]
    value = part(Sampling, soft="soft")
    flat.pop("guidance_last", None), flat.pop("guidance_reach", None)  # of rules that do not ask for them
    if flat:
        raise ValueError(f"settings.sampling has {codec.shown(sorted(flat))}, which this version does not know")
    return value | {"guidance": guidance, "temperature": temperature, "filter": kept, "fields": fields}
