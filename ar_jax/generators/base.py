"""What generators share: how they are completed, begun and seen by a decoder."""

from collections.abc import Callable
from typing import Annotated, Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from ar_jax.data import Info
from ar_jax.machine.sharding import Rules
from ar_jax.nets.attention import Kept
from ar_jax.nets.conditioning import Cond
from ar_jax.nets.linear import cast
from ar_jax.orders import Order, to_slots, whole
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Batch, Bool, Float, Having, Index, Params, PRNGKey

Conditioning = Annotated[nn.Module, Having("complete", "example")]
Head = Annotated[nn.Module, Having("loss", "sample")]
Frozen = Callable  # (*arguments, method=name) -> what that method of the frozen tokenizer returns


@struct.dataclass
class Knobs:
    """What a user turns while sampling.

    Attributes:
      guidance: float32 [steps], weight of the condition; 1 is unguided.
      temperature: float32 [steps]; 0 is greedy.
      filter: applied to the guided logits divided by the temperature.
      soften: float32 [steps], or None for codes: mixtures of all codes are drawn (see `heads.categorical.mixture`).
    """

    guidance: Array
    temperature: Array
    filter: Callable = struct.field(pytree_node=False, default=lambda logits: logits)
    soften: Array | None = None


@struct.dataclass
class Setting:
    """What stays the same in all steps of a decoding loop.

    Attributes:
      cond: of the B = b * ways guided rows (see `nets.conditioning`).
      order: what each step reveals.
      knobs: guidance, temperature, filter.
      tokenizer: calls a method of the frozen tokenizer, `tokenizer(tokens, method="embed")`; LlamaGen needs none.
      kept: how a cache keeps keys and values (see `nets.attention.Int8`).
    """

    cond: Cond
    order: Order
    knobs: Knobs
    tokenizer: Frozen | None = struct.field(pytree_node=False, default=None)
    kept: Kept = struct.field(pytree_node=False, default="own")


@struct.dataclass
class Step:
    """One step of a decoding loop.

    Attributes:
      i: its number.
      first: its first rank.
      keys: [b m], one for each of the ranks `first..first+m`.
    """

    i: Index
    first: Index
    keys: Array

    @property
    def size(self) -> int:
        return self.keys.shape[1]


@struct.dataclass
class State:
    """What a decoding loop hands from step to step.

    Attributes:
      tokens: in rank order, zeros where unknown: codes int32 [b n k], or vectors float32 [b n c].
      cache: of the network, or None if it needs none.
      parsed: int32 [b], where the tokens have a grammar: its state before the token drawn last.
    """

    tokens: Array
    cache: Any = None
    parsed: Array | None = None


class Generator(nn.Module):
    """The common ground of generators, which are modules with these fields and methods:

        conditioning   makes a condition from a batch (`Label`, `Caption`)
        spec           the tokens; None until the tokenizer is known
        loss(tokens, batch, order, *, drop, key, tokenizer) -> loss and weight of every token, metrics
        begin(setting, images) -> state        nothing is known
        step(state, now, setting) -> state     reveals the ranks of a step

    Other fields that are modules are its parts: heads, networks, inputs. Those with `complete(spec)` are told the tokens.
    """

    any_order = False  # whether ranks may be put in another order, and those known beforehand first
    corrects = False  # whether it may be given other tokens than those that it learns to predict
    parses = False  # whether its tokens follow a grammar where they have one
    editable = True  # whether it draws around tokens that are known beforehand

    def complete(self, spec: TokenSpec, info: Info) -> "Generator":
        """Fills in what only the tokenizer and the data know.

        Raises:
          ValueError: a part cannot serve such tokens, or the data lacks what the condition needs.
        """
        return self.on(spec).clone(conditioning=self.conditioning.complete(info))

    def on(self, spec: TokenSpec) -> "Generator":
        """The same generator for other tokens, if its parameters do not depend on their layout."""
        if spec.grammar and not self.parses:
            raise ValueError(
                f"{type(self).__name__} cannot draw tokens that have a grammar, as this tokenizer's have; Causal can"
            )
        parts = {name: part.complete(spec) for name, part in self.parts().items() if hasattr(part, "complete")}
        return self.clone(spec=spec, **parts)

    @nn.nowrap
    def parts(self, kind: type[nn.Module] = nn.Module) -> dict[str, nn.Module]:
        """Fields that are modules of a kind, without the conditioning."""
        fields = {
            name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("parent", "conditioning")
        }
        return {name: part for name, part in fields.items() if isinstance(part, kind)}

    def unrolled(self, params: Params) -> tuple["Generator", Params]:
        """The same generator laid out for decoding one token a step; itself, if a step computes too many rows to gain."""
        laid_out = {}
        for path, leaf in flatten_dict(params).items():
            laid_out |= self.slices(path, leaf)
        return self.by_layer(), unflatten_dict(laid_out)

    def by_layer(self) -> "Generator":
        """The module of `unrolled`."""
        return self

    def slices(self, path: tuple[str, ...], leaf: Array) -> dict[tuple[str, ...], Array]:
        """What becomes of one parameter in `unrolled`."""
        return {path: leaf}

    def multiplied(self, params: Params) -> Params:
        """Parameters for many calls: those of every part that multiplies, as sampling in its dtype has them (see `cast`)."""
        parts = self.parts() | {"conditioning": self.conditioning}
        kinds = {name: getattr(parts.get(name, self), "dtype", None) for name in params}
        return {
            name: tree if kinds[name] is None else cast({name: tree}, kinds[name])[name]
            for name, tree in params.items()
        }

    def init_params(self, key: PRNGKey) -> Params:
        net = next((getattr(self, name) for name in ("backbone", "encoder") if hasattr(self, name)), None)
        for name in ("conditioning", "inputs"):
            width = getattr(getattr(self, name, None), "width", None)
            if net is not None and width not in (None, net.width):
                raise ValueError(f"{name}.width is {width}; it must be {net.width}, that of the network")
        order, tokenizer = self.example()
        return self.init(
            key, self.spec.zeros(1), self.conditioning.example(), order, drop=jnp.zeros(1, bool), key=key,
            tokenizer=tokenizer, method="loss",
        )["params"]  # fmt: skip

    def example(self) -> tuple[Order, Frozen | None]:
        """An order and a stand-in for the tokenizer, for initialisation."""
        return whole(self.spec), None

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`): heads first, whose names others may match."""
        parts = sorted(self.parts().items(), key=lambda part: "head" not in part[0])
        return tuple(dict.fromkeys(rule for _, part in parts for rule in getattr(part, "rules", ())))

    def condition(self, batch: Batch, drop: Bool[Array, "b"]) -> Cond:
        """All that depends on the condition only; `drop` marks images that go without."""
        cond = self.conditioning(batch, drop)
        return cond.replace(mod=self.modulate(cond.mod))

    def modulate(self, vector: Array | None) -> Any:
        """What the condition's vector does to the network, once for all layers and steps."""
        return self.backbone.modulate(vector) if hasattr(self, "backbone") else None

    @nn.nowrap
    def memory(self) -> Params:
        """What training remembers from one update to the next beside parameters, {} if nothing.

        A generator that has some is given it as `loss(..., memory=...)`, and returns it anew as the metric "memory".
        """
        return {}

    def grow(self, state: State, ranks: int, setting: Setting) -> State:
        """Makes room for the first `ranks` ranks."""
        return state

    @nn.nowrap
    def seen(self, state: Any, ranks: Index, order: Order) -> Bool[Array, "#b n"]:
        """Slots whose tokens are known in a state, the first so many ranks."""
        known = jnp.broadcast_to(jnp.arange(order.n) < ranks, (len(order.slot), order.n))
        return to_slots(known[..., None].astype(jnp.int32), order)[..., 0] > 0

    @nn.nowrap
    def calls(self, order: Order) -> dict[str, np.ndarray]:
        """Calls of each of its networks in every step, int [steps]: "generator", and "head" where that has steps itself."""
        steps = len(order.sizes)
        head = getattr(getattr(self, "head", None), "calls", None)
        return {"generator": np.ones(steps, int)} | ({"head": head(steps)} if head else {})


def image_weight(batch: Batch, images: int) -> Float[Array, "b"]:
    """Weight of every image in training, float32: `batch["valid"]`, 1 where there is none."""
    return jnp.asarray(batch.get("valid", jnp.ones(images)), jnp.float32)
