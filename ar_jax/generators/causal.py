"""Causal generators: each token is predicted from those of earlier steps, rows are fed once into a cache."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from ar_jax.data import Info
from ar_jax.generators.inputs import Frozen, NextScale, Previous
from ar_jax.heads.categorical import Categorical
from ar_jax.machine.sharding import BATCH, Rules, constrain
from ar_jax.nets.conditioning import Cond
from ar_jax.nets.gated import EncoderDecoder
from ar_jax.nets.linear import output_major
from ar_jax.nets.positions import NOWHERE
from ar_jax.nets.transformer import Backbone, Cache, unrolled
from ar_jax.orders import NEVER, Order, to_ranks
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Batch, Bool, Float, Index, Int, Key, Metrics, Params, PRNGKey, Tokens, typed


@struct.dataclass
class State:
    """The sampling loop's carry.

    Attributes:
      tokens: in rank order, zeros where unknown: codes int32 [b n k], or vectors in their place (see `Knobs.soften`).
      cache: of the network, or None if it needs none.
    """

    tokens: Array
    cache: Cache | None


class Causal(nn.Module):
    """Prediction of tokens step by step, one token or many at a time.

    Each rank has a row, which the network turns into a prediction of its token. What the row carries is up to `inputs`:
    the token before (LlamaGen), or what coarser scales say of the place (VAR).

    Attributes:
      backbone: the network (`Transformer`, `AdaLN`, `EncoderDecoder`).
      conditioning: makes condition rows from a batch (`Label`, `Caption`).
      head: turns hidden rows into a distribution over tokens (`Categorical`; `Diffusion`, `Flow`, `GaussianMixture`).
      inputs: what rows carry (`Previous`, `NextScale`, `Upsampled`, `NextLatent`).
      dropout: rate on the input rows; active only when a "dropout" key is given to `apply`.
      emphasis: weight of a step's tokens in training: all tokens alike ("equal"), or "lognorm" (see `lognorm`).
      spec: the tokens; None until the tokenizer is known (`complete`).
    Source: LlamaGen (arXiv:2406.06525), VAR (arXiv:2404.02905), FlexVAR (arXiv:2502.20313).
    """

    backbone: Backbone | EncoderDecoder
    conditioning: nn.Module
    head: nn.Module = Categorical()
    inputs: Previous | NextScale = Previous()
    dropout: float = 0.0
    emphasis: str = "equal"
    spec: TokenSpec | None = None

    any_order = False  # whether ranks may be put in another order, and those known beforehand first

    def complete(self, spec: TokenSpec, info: Info) -> "Causal":
        """Fills in what only the tokenizer and the data know.

        Raises:
          ValueError: the head cannot predict such tokens, or the data lacks what the condition needs.
        """
        if self.emphasis not in ("equal", "lognorm"):
            raise ValueError(f"generator.emphasis is {self.emphasis!r}; it must be equal or lognorm")
        return self.on(spec).clone(conditioning=self.conditioning.complete(info))

    def on(self, spec: TokenSpec) -> "Causal":
        """The same generator for other tokens of the same codebook, if its parameters do not depend on their layout."""
        inputs = self.inputs.complete(spec, self.backbone.width)
        return self.clone(
            spec=spec, inputs=inputs, head=self.head.complete(spec), backbone=self.backbone.complete(spec)
        )

    def unrolled(self, params: Params) -> tuple["Causal", Params]:
        """The same generator laid out for decoding (see `transformer.unrolled`)."""
        networks, heads, changed = self.parts(Backbone), self.parts(Categorical), dict(params)
        for name, module in networks.items():
            changed[name] = unrolled(params[name], module.layers)
        for name in heads:
            changed[name] = output_major(params[name])
        module = self.clone(
            **{name: module.clone(unroll=True) for name, module in networks.items()},
            **{name: module.clone(output_major=True) for name, module in heads.items()},
        )
        return module, changed

    @nn.nowrap
    def parts(self, kind: type[nn.Module]) -> dict[str, nn.Module]:
        """Fields that are modules of a kind."""
        return {name: part for name in self.__dataclass_fields__ if isinstance(part := getattr(self, name), kind)}

    def init_params(self, key: PRNGKey) -> Params:
        drop = jnp.zeros(1, bool)
        tokens = self.spec.zeros(1)
        order, tokenizer = self.inputs.example()
        batch = self.conditioning.example()
        return self.init(key, tokens, batch, order, drop=drop, key=key, tokenizer=tokenizer, method="loss")["params"]

    def setup(self):
        self.drop = nn.Dropout(self.dropout)

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        parts = [part for part in self.parts(nn.Module).values() if hasattr(part, "rules")]
        return tuple(dict.fromkeys(rule for part in parts for rule in part.rules))

    def condition(self, batch: Batch, drop: Bool[Array, "b"]) -> Cond:
        """All that depends on the condition only; `drop` marks images that go without."""
        cond = self.conditioning(batch, drop)
        return cond.replace(mod=self.backbone.modulate(cond.mod))

    @typed
    def loss(
        self,
        tokens: Int[Array, "b s k"] | Float[Array, "b s k"],
        batch: Batch,
        order: Order,
        *,
        drop: Bool[Array, "b"],
        key: PRNGKey | None = None,
        tokenizer: Frozen | None = None,
    ) -> tuple[Float[Array, "b n"], Float[Array, "b n"], Metrics]:
        """Teacher forcing.

        Args:
          tokens: in slot order.
          batch: the condition, and optionally "valid" [b], the weight of each image (default 1).
          order: what each step reveals.
          drop: images trained without their condition.
          key: for heads that draw noise.
          tokenizer: calls a method of the frozen tokenizer; `Previous` needs none.

        Returns:
          The head's loss and weight of every rank, and metrics.
        """
        target = to_ranks(tokens, order)
        loss = self.head.loss(self.hidden(target, self.condition(batch, drop), order, tokenizer), target, key=key)
        weight = self.weight(batch, order, len(tokens))
        if not self.spec.codes:
            return loss, weight, {}
        return loss, weight, {"perplexity": jnp.exp((loss * weight).sum() / jnp.maximum(weight.sum(), 1e-9))}

    @nn.nowrap
    def weight(self, batch: Batch, order: Order, images: int) -> Float[Array, "b n"]:
        """Weight of every rank in training."""
        valid = jnp.asarray(batch.get("valid", jnp.ones(images)), jnp.float32)
        by_slot = lognorm(self.spec) if self.emphasis == "lognorm" else np.ones(self.spec.n, np.float32)
        by_rank = jnp.asarray(by_slot)[order.slot] * jnp.asarray(order.step != NEVER, jnp.float32)
        return valid[:, None] * by_rank

    def hidden(
        self, tokens: Tokens, cond: Cond, order: Order, tokenizer: Frozen | None = None
    ) -> Float[Array, "b n d"]:
        """Hidden row of every rank, from tokens in rank order."""
        p = cond.rows.shape[1]
        x, coords = self.inputs(tokens, cond, order, tokenizer, 0, order.n)
        x = constrain(jnp.concatenate([cond.rows[:, :-1].astype(x.dtype), x], axis=1), BATCH)
        coords = jnp.pad(coords, ((0, 0), (p - 1, 0), (0, 0)), constant_values=NOWHERE)
        x = self.drop(x, deterministic=not self.has_rng("dropout"))
        h, _ = self.network(x, _steps(p, order), coords, cond, valid=_valid(cond, p - 1 + order.n))
        return h[:, p - 1 :]

    def network(self, x, step, coords, cond, **cached):
        """Rows through the network, see `Transformer`."""
        return self.backbone(x, step, coords, mod=cond.mod, **cached)

    def begin(self, cond: Cond, order: Order, images: int, vectors: int = 0) -> State:
        """Feeds all condition rows but the last into an empty cache.

        Args:
          vectors: width of the vectors that stand for codes, or 0 for codes.
        """
        self.inputs.check(order)
        rows, p, _ = cond.rows.shape
        cache = self.backbone.empty_cache(rows)
        if p > 1:
            step = cond.step[:-1]
            _, cache = self.network(
                cond.rows[:, :-1], step, jnp.full((1, p - 1, 3), NOWHERE), cond, cache=cache.grow(p - 1), keys=step,
                valid=_valid(cond, p - 1),
            )  # fmt: skip
        vectors = vectors or self.spec.channels
        dtype = jnp.float32 if vectors else jnp.int32
        return State(jnp.zeros((images, order.n, vectors or 1), dtype), cache)

    def grow(self, state: State, ranks: int, cond: Cond) -> State:
        """Makes room in the cache for the first `ranks` ranks."""
        return state if state.cache is None else state.replace(cache=state.cache.grow(cond.rows.shape[1] - 1 + ranks))

    def step(
        self,
        state: State,
        i: Index,
        first: Index,
        size: int,
        *,
        cond: Cond,
        order: Order,
        knobs,
        keys: Key[Array, "b m"],
        tokenizer: Frozen | None = None,
    ) -> State:
        """Reveals ranks first..first+size."""
        h, cache = self.rows(state, first, size, cond, order, tokenizer)
        token = self.head.sample(h, keys, knobs, i, tokenizer)
        return State(lax.dynamic_update_slice_in_dim(state.tokens, token, first, axis=1), cache)

    def rows(
        self, state: State, first: Index, size: int, cond: Cond, order: Order, tokenizer: Frozen | None = None
    ) -> tuple[Float[Array, "B m d"], Cache | None]:
        """Hidden rows of ranks first..first+size, given a state in which all earlier steps are known and cached."""
        p = cond.rows.shape[1]
        x, coords = self.inputs(state.tokens, cond, order, tokenizer, first, size)
        steps = _steps(p, order)
        if isinstance(first, int):
            step = steps[p - 1 + first : p - 1 + first + size]
        else:
            step = lax.dynamic_slice_in_dim(jnp.asarray(steps), p - 1 + first, size)
        if state.cache is None:
            return self.network(x, step, coords, cond)
        filled = state.cache.rows
        return self.network(
            x, step, coords, cond, cache=state.cache, first=p - 1 + first, keys=steps[:filled],
            valid=_valid(cond, filled),
        )  # fmt: skip


def lognorm(spec: TokenSpec) -> np.ndarray:
    """Weight of every slot, float32 [n], with sum 1: scales of middling size count most, whatever their slots.

    Source: HMAR (arXiv:2506.04421).
    """
    sides = np.sqrt([height * width for height, width in spec.scales])
    place = sides / sides[-1]
    each = np.exp(-0.5 * np.square((place[::-1] - place.mean()) / place.std(ddof=1)))
    each /= each.sum()
    return np.repeat(each / np.square(sides), np.square(sides).round().astype(int)).astype(np.float32)


def _steps(p: int, order: Order) -> Array:
    """Steps of p-1 condition rows and of the rows of all ranks."""
    before, step = np.arange(1 - p, 0, dtype=np.int32), order.step
    return (np if isinstance(step, np.ndarray) else jnp).concatenate([before, step])


def _valid(cond: Cond, rows: int) -> Bool[Array, "B r"] | None:
    """Which of the first `rows` rows may be seen."""
    if cond.valid is None:
        return None
    p = cond.valid.shape[1]
    return jnp.pad(cond.valid[:, :rows], ((0, 0), (0, max(0, rows - p))), constant_values=True)
