"""Causal generators: each token is predicted from all earlier ones, rows are fed once into a cache."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from ar_jax.data import Info
from ar_jax.decode.guidance import widen
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.conditioning import Cond
from ar_jax.nets.linear import look_up, output_major
from ar_jax.nets.positions import NOWHERE
from ar_jax.nets.transformer import Cache, Transformer, init, unrolled
from ar_jax.orders import Order, raster, to_ranks
from ar_jax.sharding import BATCH, Rules, constrain
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Batch, Bool, Float, Index, Int, Key, Metrics, Params, PRNGKey, typed


@struct.dataclass
class State:
    """The sampling loop's carry: tokens int32 [b n k] in rank order (zeros where unknown), and the cache."""

    tokens: Array
    cache: Cache


class Causal(nn.Module):
    """Next-token prediction on the codes of a discrete tokenizer.

    The row that predicts rank r carries the token of rank r-1; the row of rank 0 is the condition's last row.

    Attributes:
      backbone: the network.
      conditioning: makes condition rows from a batch (`Label`, `Caption`).
      head: turns hidden rows into a distribution over tokens.
      dropout: rate on the input rows; active only when a "dropout" key is given to `apply`.
      spec: the tokens; None until the tokenizer is known (`complete`).
    Source: LlamaGen (arXiv:2406.06525).
    """

    backbone: Transformer
    conditioning: nn.Module
    head: Categorical = Categorical()
    dropout: float = 0.0
    spec: TokenSpec | None = None

    def complete(self, spec: TokenSpec, info: Info) -> "Causal":
        """Fills in what only the tokenizer and the data know.

        Raises:
          ValueError: the head cannot predict such tokens, or the data lacks what the condition needs.
        """
        return self.clone(spec=spec, conditioning=self.conditioning.complete(info), head=self.head.complete(spec))

    def unrolled(self, params: Params) -> tuple["Causal", Params]:
        """The same generator laid out for decoding (see `transformer.unrolled`)."""
        module = self.clone(backbone=self.backbone.clone(unroll=True), head=self.head.clone(output_major=True))
        backbone, head = unrolled(params["backbone"], self.backbone.layers), output_major(params["head"])
        return module, params | {"backbone": backbone, "head": head}

    def init_params(self, key: PRNGKey) -> Params:
        drop = jnp.zeros(1, bool)
        tokens = jnp.zeros((1, self.spec.n, 1), jnp.int32)
        return self.init(key, tokens, self.conditioning.example(), raster(self.spec), drop=drop, method="loss")[
            "params"
        ]

    def setup(self):
        self.embedding = self.param("embedding", init, (self.spec.codes[0], self.backbone.width))
        self.drop = nn.Dropout(self.dropout)

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        return (*self.backbone.rules, *self.head.rules)

    def embed(self, index: Int[Array, "b m"]) -> Float[Array, "b m d"]:
        return look_up(self.embedding.astype(self.backbone.dtype), index)

    def condition(self, batch: Batch, drop: Bool[Array, "b"]) -> Cond:
        """The condition's rows; `drop` marks images that go without."""
        return self.conditioning(batch, drop)

    @typed
    def loss(
        self,
        tokens: Int[Array, "b n 1"],
        batch: Batch,
        order: Order,
        *,
        drop: Bool[Array, "b"],
        key: PRNGKey | None = None,
        embed: Callable | None = None,
    ) -> tuple[Float[Array, "b n"], Float[Array, "b n"], Metrics]:
        """Teacher forcing.

        Args:
          tokens: in slot order.
          batch: the condition, and optionally "valid" [b], the weight of each image (default 1).
          order: one slot per step.
          drop: images trained without their condition.
          key: unused.
          embed: unused; this generator learns its own embedding of the codes.

        Returns:
          Cross entropy in nats and weight of every rank, and metrics.
        """
        target = to_ranks(tokens, order)
        loss = self.head.loss(self.hidden(target, self.condition(batch, drop), order), target)
        valid = batch.get("valid", jnp.ones(len(tokens)))
        weight = jnp.broadcast_to(valid[:, None].astype(jnp.float32), loss.shape)
        return loss, weight, {"perplexity": jnp.exp((loss * weight).sum() / jnp.maximum(weight.sum(), 1))}

    def hidden(self, tokens: Int[Array, "b n 1"], cond: Cond, order: Order) -> Float[Array, "b n d"]:
        """Hidden row of every rank, from tokens in rank order."""
        p = cond.rows.shape[1]
        embedded = self.embed(tokens[:, :-1, 0])
        x = constrain(jnp.concatenate([cond.rows.astype(embedded.dtype), embedded], axis=1), BATCH)
        coords = jnp.pad(self._coords(order)[:, :-1], ((0, 0), (p, 0), (0, 0)), constant_values=NOWHERE)
        x = self.drop(x, deterministic=not self.has_rng("dropout"))
        h, _ = self.backbone(x, _steps(p, self.spec.n), coords, valid=_valid(cond, p - 1 + self.spec.n))
        return h[:, p - 1 :]

    def begin(self, cond: Cond, order: Order, images: int) -> State:
        """Feeds all condition rows but the last into an empty cache."""
        self._check(order)
        rows, p, _ = cond.rows.shape
        cache = self.backbone.empty_cache(rows).grow(p - 1)
        if p > 1:
            _, cache = self.backbone(
                cond.rows[:, :-1], cond.step[:-1], self._nowhere(p - 1), cache=cache, keys=cond.step[:-1],
                valid=_valid(cond, p - 1),
            )  # fmt: skip
        return State(jnp.zeros((images, self.spec.n, 1), jnp.int32), cache)

    def grow(self, state: State, ranks: int, cond: Cond) -> State:
        """Makes room in the cache for the first `ranks` ranks."""
        return state.replace(cache=state.cache.grow(cond.rows.shape[1] - 1 + ranks))

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
        embed: Callable | None = None,
    ) -> State:
        """Reveals rank `first` (`size` is 1)."""
        h, cache = self.row(state, first, cond, order)
        token = self.head.sample(h, keys, knobs, i)
        return State(lax.dynamic_update_slice_in_dim(state.tokens, token, first, axis=1), cache)

    def row(self, state: State, rank: Index, cond: Cond, order: Order) -> tuple[Float[Array, "B 1 d"], Cache]:
        """Hidden row that predicts `rank`, given a state in which all earlier ranks are known and cached."""
        p, before = cond.rows.shape[1], jnp.maximum(rank - 1, 0)
        token = lax.dynamic_slice_in_dim(state.tokens, before, 1, axis=1)[..., 0]
        slot = lax.dynamic_slice_in_dim(self._coords(order), before, 1, axis=1)
        ways = len(cond.rows) // len(token)
        x = jnp.where(rank == 0, cond.rows[:, -1:], widen(self.embed(token), ways))
        coords = jnp.where(rank == 0, NOWHERE, widen(slot, ways if len(slot) > 1 else 1))
        rows = state.cache.rows
        return self.backbone(
            x, jnp.asarray(rank, jnp.int32)[None], coords, cache=state.cache, first=p - 1 + rank,
            keys=_steps(p, self.spec.n)[:rows], valid=_valid(cond, rows),
        )  # fmt: skip

    def _coords(self, order: Order) -> Int[Array, "#b n 3"]:
        return jnp.asarray(self.spec.coords)[order.slot]

    def _nowhere(self, rows: int) -> Int[Array, "1 p 3"]:
        return jnp.full((1, rows, 3), NOWHERE)

    def _check(self, order: Order):
        if set(order.sizes) != {1} or len(order.sizes) != self.spec.n:
            raise ValueError(
                f"Causal reveals one of {self.spec.n} slots per step, but order.sizes is {order.sizes[:8]}...; "
                f"use orders.raster or another order of single slots"
            )


def _steps(p: int, n: int) -> np.ndarray:
    """Steps of p condition rows and of the rows of ranks 0..n-2; the condition's last row has step 0."""
    return np.arange(1 - p, n, dtype=np.int32)


def _valid(cond: Cond, rows: int) -> Bool[Array, "B r"] | None:
    """Which of the first `rows` rows may be seen."""
    if cond.valid is None:
        return None
    p = cond.valid.shape[1]
    return jnp.pad(cond.valid[:, :rows], ((0, 0), (0, max(0, rows - p))), constant_values=True)
