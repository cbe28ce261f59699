"""Masked prediction in which the drawn tokens decide which of them are kept."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ar_jax.data import Info
from ar_jax.generators.inputs import Frozen
from ar_jax.machine.sharding import BATCH, Rules, constrain
from ar_jax.nets.conditioning import Cond, widen
from ar_jax.nets.linear import Linear
from ar_jax.nets.mlp import xavier
from ar_jax.nets.vit import GPT
from ar_jax.orders import Order, raster, to_ranks, to_slots
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Batch, Bool, Float, Index, Key, Metrics, Params, PRNGKey, typed


@struct.dataclass
class State:
    """The sampling loop's carry.

    Attributes:
      tokens: float32 [b n c], in rank order; what is not known is never read.
      known: bool [b n], in slot order; none before the first step.
    """

    tokens: Array
    known: Array


class MaskGIT(nn.Module):
    """Every step draws all hidden tokens and keeps those of the highest density, up to noise that fades.

    Which slots a step reveals is found while drawing; the order (`orders.Confident`) says only how many. A row carries
    half a token's projection and half a sign that it is known, as in GIVT's "concat" fusion.

    Attributes:
      backbone: the network, with a position for the condition's row and every token; 0 rows are filled in by `complete`.
      conditioning: makes one row from a batch (`Label`), as wide as the network.
      head: its `draw` gives tokens and how sure they are.
      choice: size of the noise in the first step (the papers' choice temperature).
      most: part of the schedule that training goes through; after a part s of it, cos(pi/2 s) of the tokens are hidden.
      spec: the tokens; None until the tokenizer is known (`complete`).
    Source: GIVT-MaskGIT (arXiv:2312.02116); MaskGIT (arXiv:2202.04200).
    """

    backbone: GPT
    conditioning: nn.Module
    head: nn.Module
    choice: float = 35.0
    most: float = 0.7
    spec: TokenSpec | None = None

    any_order = True  # whether ranks may be put in another order, and those known beforehand first

    def complete(self, spec: TokenSpec, info: Info) -> "MaskGIT":
        """Fills in what only the tokenizer and the data know.

        Raises:
          ValueError: the head cannot predict such tokens, or the data lacks what the condition needs.
        """
        backbone = self.backbone if self.backbone.rows else self.backbone.clone(rows=spec.n + 1)
        conditioning, head = self.conditioning.complete(info), self.head.complete(spec)
        return self.clone(spec=spec, backbone=backbone, conditioning=conditioning, head=head)

    def unrolled(self, params: Params) -> tuple["MaskGIT", Params]:
        """Itself: so many rows are computed in a step that the layout of the layers does not matter."""
        return self, params

    def init_params(self, key: PRNGKey) -> Params:
        tokens, drop = jnp.zeros((1, self.spec.n, self.spec.channels)), jnp.zeros(1, bool)
        return self.init(
            key, tokens, self.conditioning.example(), raster(self.spec), drop=drop, key=key, method="loss"
        )["params"]

    def setup(self):
        self.projection = Linear(self.backbone.width, kernel_init=xavier, bias=True)
        # of a hidden token, of a known one, and in place of the hidden one's value
        self.signs = self.param("signs", nn.initializers.normal(1.0), (3, self.backbone.width))

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        return (*self.head.rules, *self.backbone.rules)

    def condition(self, batch: Batch, drop: Bool[Array, "b"]) -> Cond:
        """The condition's row; `drop` marks images that go without."""
        return self.conditioning(batch, drop)

    @typed
    def loss(
        self,
        tokens: Float[Array, "b n c"],
        batch: Batch,
        order: Order,
        *,
        drop: Bool[Array, "b"],
        key: PRNGKey,
        tokenizer: Frozen | None = None,
    ) -> tuple[Float[Array, "b n"], Float[Array, "b n"], Metrics]:
        """Prediction of the hidden tokens; which and how many is drawn for every image.

        Args:
          tokens: in slot order.
          batch: the condition, and optionally "valid" [b], the weight of each image (default 1).
          order: unused.
          drop: images trained without their condition.
          key: for the mask and the head.
          tokenizer: unused.

        Returns:
          The head's loss and weight of every slot (0 where it is known), and metrics.
        """
        ratio_key, mask_key, head_key = jax.random.split(key, 3)
        shape = tokens.shape[:2]
        ratio = mask_ratio(jax.random.uniform(ratio_key, (shape[0], 1), maxval=self.most))
        hidden = lowest(jax.random.uniform(mask_key, shape), ratio * shape[1])
        h = self.hidden(tokens, hidden, self.condition(batch, drop))
        loss = self.head.loss(h, tokens, key=head_key)
        valid = batch.get("valid", jnp.ones(shape[0]))
        return loss, valid[:, None].astype(jnp.float32) * hidden, {"masked": hidden.mean()}

    @typed
    def hidden(self, tokens: Float[Array, "b n c"], hidden: Bool[Array, "b n"], cond: Cond) -> Float[Array, "B n d"]:
        """Hidden row of every slot.

        Args:
          tokens: in slot order.
          hidden: which of them the network must not see.
          cond: rows of B = b * ways guided images.
        """
        mask, known, nothing = self.signs
        sign = jnp.where(hidden[..., None], mask, known)
        value = jnp.where(hidden[..., None], nothing, self.projection(tokens))
        x = widen(jnp.concatenate([sign[..., ::2], value[..., ::2]], axis=-1), len(cond.rows) // len(tokens))
        x = constrain(jnp.concatenate([cond.rows.astype(x.dtype), x], axis=1), BATCH)
        rows = cond.rows.shape[1]
        coords = np.concatenate([np.zeros((rows, 3), np.int32), self.spec.coords])
        h, _ = self.backbone(x, np.zeros(x.shape[1], np.int32), coords[None])
        return h[:, rows:]

    def begin(self, cond: Cond, order: Order, images: int, vectors: int = 0) -> State:
        """Nothing is known; `vectors` is unused."""
        n = self.spec.n
        return State(jnp.zeros((images, n, self.spec.channels)), jnp.zeros((images, n), bool))

    def grow(self, state: State, ranks: int, cond: Cond) -> State:
        """There is room for all ranks from the start."""
        return state

    def step(
        self,
        state: State,
        i: Index,
        first: Index,
        size: int,
        *,
        cond: Cond,
        order: Order,
        knobs: Any,
        keys: Key[Array, "b m"],
        tokenizer: Frozen | None = None,
    ) -> State:
        """Draws all hidden tokens and keeps as many as the order's step reveals, whatever their ranks.

        Before the first step, ranks before `first` are those known beforehand.
        """
        n, slots = self.spec.n, jnp.arange(self.spec.n)
        before = to_slots((slots < first)[None, :, None].astype(jnp.int32), order)[..., 0] > 0
        known, tokens = jnp.where(state.known.any(), state.known, before), to_slots(state.tokens, order)
        each = jax.vmap(lambda key: jax.vmap(functools.partial(jax.random.fold_in, key))(slots))(keys[:, 0])
        drawn, sure = self.head.draw(self.hidden(tokens, ~known, cond), each, knobs, i)
        noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, n), (n,)))(keys[:, 0])
        sure = sure + self.choice * (1 - (i + 1) / len(order.sizes)) * noise
        hidden = lowest(jnp.where(known, jnp.inf, sure), n - first - jnp.asarray(order.sizes)[i])
        return State(to_ranks(jnp.where(known[..., None], tokens, drawn), order), ~hidden)


def mask_ratio(progress: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Part of the tokens that is hidden after a part `progress` of the steps; never none, as published."""
    return jnp.clip(jnp.cos(math.pi / 2 * progress), 1e-6, 1.0)


def lowest(score: Float[Array, "b n"], count: Any) -> Bool[Array, "b n"]:
    """The `count` smallest of every row; of a broken number, so many that it is reached."""
    return jnp.argsort(jnp.argsort(score, axis=1), axis=1) < count
