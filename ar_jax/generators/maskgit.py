"""Masked prediction in which the drawn tokens decide which of them are kept."""

import functools
import math
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ar_jax.generators.base import Conditioning, Frozen, Generator, Head, Setting, Step, image_weight
from ar_jax.machine import shares
from ar_jax.machine.sharding import BATCH, constrain
from ar_jax.nets.attention import Rows
from ar_jax.nets.conditioning import Cond, widen
from ar_jax.nets.linear import Linear, look_up
from ar_jax.nets.mlp import xavier
from ar_jax.orders import Curve, Order, to_ranks, to_slots
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Batch, Bool, Float, Having, Index, Int, Key, Metrics, PRNGKey, Share, typed


@struct.dataclass
class State:
    """The sampling loop's carry.

    Attributes:
      tokens: in rank order; what is not known is never read.
      known: bool [b n], in slot order; none before the first step.
    """

    tokens: Array
    known: Array


class MaskGIT(Generator):
    """Every step draws all hidden tokens and keeps those of the highest density, up to noise that fades.

    Which slots a step reveals is found while drawing; the order (`orders.Confident`) says only how many. The row of a
    hidden code has a learned vector of its own; of continuous tokens, a row carries half a token's projection and half a
    sign that it is known, as in GIVT's "concat" fusion.

    Attributes:
      backbone: the network, with a position for the condition's row and every token; 0 rows are filled in by `complete`.
      conditioning: makes one row from a batch (`Label`), as wide as the network.
      head: its `decide` gives tokens and how sure they are.
      choice: size of the noise in the first step (the papers' choice temperature), from which it falls to 0.
      most: part of the schedule that training goes through; after a part s of it, some of the tokens are hidden.
      curve: how many: cos(pi/2 s) of them or 2/pi arccos(s).
      kept: which of the tokens drawn in a step stay: the surest, or those of the order's next ranks.
      noise: how large it is, by `choice` ("fading") or as the temperature of the step.
      known_weight: what known tokens weigh in the loss, beside hidden ones that weigh 1.
      spec: the tokens; None until the tokenizer is known (`complete`).
    Source: MaskGIT (arXiv:2202.04200); GIVT-MaskGIT (arXiv:2312.02116); "arccos" and noise as the temperature are of TiTok's
      generators (arXiv:2406.07550).
    """

    backbone: Annotated[nn.Module, Having("rows")]
    conditioning: Conditioning
    head: Head
    choice: float = 35.0
    most: Share = 0.7
    spec: TokenSpec | None = None
    curve: Curve = "cos"
    noise: Literal["fading", "temperature"] = "fading"
    known_weight: Share = 0.0
    kept: Literal["surest", "ordered"] = "surest"

    any_order = True
    adjustable = ("choice",)

    def on(self, spec: TokenSpec) -> "MaskGIT":
        if len(spec.codes) > 1:
            raise ValueError(
                f"MaskGIT embeds tokens of one code, but the tokenizer gives codes {spec.codes}; use Masked with `vectors`"
            )
        return super().on(spec)

    def setup(self):
        width = self.backbone.width
        if self.spec.codes:  # the last row is that of a hidden one
            self.embedding = self.param("embedding", nn.initializers.normal(0.02), (self.spec.codes[0] + 1, width))
        else:
            self.projection = Linear(width, kernel_init=xavier, bias=True)
            # of a hidden token, of a known one, and in place of the hidden one's value
            self.signs = self.param("signs", nn.initializers.normal(1.0), (3, width))

    @typed
    def loss(
        self,
        tokens: Int[Array, "b n k"] | Float[Array, "b n k"],
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
          The head's loss and weight of every slot (`known_weight` where it is known), and metrics.
        """
        ratio_key, mask_key, head_key = jax.random.split(key, 3)
        shape = tokens.shape[:2]
        uniforms = (
            shares.draw(jax.random.uniform, key, of) for key, of in ((ratio_key, (shape[0], 1)), (mask_key, shape))
        )
        hidden = self.drawn_mask(*uniforms)
        h = self.hidden(tokens, hidden, self.condition(batch, drop))
        loss = self.head.loss(h, tokens, key=head_key)
        return loss, image_weight(batch, shape[0])[:, None] * self.weigh(hidden), {"masked": hidden.mean()}

    @nn.nowrap
    def drawn_mask(self, progress: Float[Array, "b 1"], scores: Float[Array, "b n"]) -> Bool[Array, "b n"]:
        """Slots that training hides, at least one of every image, from uniform numbers."""
        ratio, n = mask_ratio(self.most * progress, self.curve), scores.shape[1]
        count = jnp.ceil(ratio * n) if self.curve == "cos" else jnp.maximum(jnp.round(ratio * n), 1)
        return jnp.argsort(scores, axis=1) < count  # the inverse of a random permutation is as random

    def weigh(self, hidden: Bool[Array, "b n"]) -> Float[Array, "b n"]:
        """What slots weigh in the loss."""
        return jnp.where(hidden, 1.0, self.known_weight)

    @typed
    def hidden(
        self, tokens: Int[Array, "b n k"] | Float[Array, "b n k"], hidden: Bool[Array, "b n"], cond: Cond
    ) -> Float[Array, "B n d"]:
        """Hidden row of every slot.

        Args:
          tokens: in slot order.
          hidden: which of them the network must not see.
          cond: rows of B = b * ways guided images.
        """
        x = widen(self.embed(tokens, hidden), len(cond.rows) // len(tokens))
        x = constrain(jnp.concatenate([cond.rows.astype(x.dtype), x], axis=1), BATCH)
        h, _ = self.backbone(x, Rows(np.zeros(x.shape[1], np.int32)))
        return h[:, cond.rows.shape[1] :]

    def embed(self, tokens: Array, hidden: Array) -> Float[Array, "b n d"]:
        """Row of every slot: of a code or of a hidden one; of continuous tokens half their value and half a sign."""
        if self.spec.codes:
            return look_up(self.embedding, jnp.where(hidden, self.spec.codes[0], tokens[..., 0]))
        mask, known, nothing = self.signs
        sign = jnp.where(hidden[..., None], mask, known)
        value = jnp.where(hidden[..., None], nothing, self.projection(tokens))
        return jnp.concatenate([sign[..., ::2], value[..., ::2]], axis=-1)

    def begin(self, setting: Setting, images: int) -> State:
        return State(self.spec.zeros(images), jnp.zeros((images, self.spec.n), bool))

    @nn.nowrap
    def seen(self, state: State, ranks: Any, order: Order) -> Bool[Array, "b n"]:
        return state.known

    def step(self, state: State, now: Step, setting: Setting) -> State:
        """Draws all hidden tokens and keeps as many as the order's step reveals, whatever their ranks.

        Before the first step, ranks before `first` are those known beforehand.
        """
        n, order = self.spec.n, setting.order
        rank, known, tokens, each = self.sight(state, now, setting)
        drawn, sure = self.head.decide(self.hidden(tokens, ~known, setting.cond), each, setting.knobs, now.i)
        if self.kept == "ordered":
            sure = jnp.broadcast_to(-rank, sure.shape).astype(sure.dtype)
        else:
            sure = sure + self.noise_of(now.i, setting) * self.gumbel(now.keys[:, 0])
        hidden = lowest(jnp.where(known, jnp.inf, sure), n - now.first - jnp.asarray(order.sizes)[now.i])
        return State(to_ranks(jnp.where(known[..., None], tokens, drawn), order), ~hidden)

    @nn.nowrap
    def sight(self, state: State, now: Step, setting: Setting) -> tuple[Array, Array, Array, Key[Array, "b n"]]:
        """Before a step, in slot order: ranks [#b n], which slots are known, tokens, and a key for each."""
        slots, order = jnp.arange(self.spec.n), setting.order
        rank = to_slots(jnp.broadcast_to(slots, order.slot.shape)[..., None], order)[..., 0]
        known = jnp.where(state.known.any(), state.known, rank < now.first)
        each = jax.vmap(lambda key: jax.vmap(functools.partial(jax.random.fold_in, key))(slots))(now.keys[:, 0])
        return rank, known, to_slots(state.tokens, order), each

    @nn.nowrap
    def noise_of(self, i: Index, setting: Setting) -> Float[Array, ""]:
        """Size of the noise in step `i`."""
        if self.noise == "temperature":
            return jnp.asarray(setting.knobs.temperature)[i]
        return self.choice * (1 - (i + 1) / len(setting.order.sizes))

    @nn.nowrap
    def gumbel(self, keys: Key[Array, "b"]) -> Float[Array, "b n"]:
        """The noise of one step."""
        n = self.spec.n
        return jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, n), (n,)))(keys)


def mask_ratio(progress: Float[Array, "*b"], curve: Curve = "cos") -> Float[Array, "*b"]:
    """Part of the tokens that is hidden after a part `progress` of the steps; never none, as published."""
    ratio = jnp.cos(math.pi / 2 * progress) if curve == "cos" else jnp.arccos(progress) / (math.pi / 2)
    return jnp.clip(ratio, 1e-6, 1.0)


def lowest(score: Float[Array, "b n"], count: Any) -> Bool[Array, "b n"]:
    """The `count` smallest of every row; of a broken number, so many that it is reached."""
    return jnp.argsort(jnp.argsort(score, axis=1), axis=1) < count
