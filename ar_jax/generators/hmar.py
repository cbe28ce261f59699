"""HMAR: next-scale prediction that sees its own scale only, and redraws parts of a scale by masked prediction."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ar_jax.data import Info
from ar_jax.generators.base import Frozen, Setting, State, Step, image_weight
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import some
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.adaln import AdaLN
from ar_jax.nets.attention import Rows
from ar_jax.nets.conditioning import Cond
from ar_jax.orders import Order, to_ranks, to_slots
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Batch, Bool, Float, Index, Int, Metrics, PRNGKey, typed

BRANCHES = ("scales", "masks")


class Hmar(Causal):
    """A trunk with two ends: one predicts a whole scale at once, one predicts masked tokens of a scale from the others.

    What coarser scales say is all in a row's input, so rows see their own scale only and no cache is needed. Networks are
    `AdaLN` with `sees="step"`, the trunk without last norm.

    Attributes:
      backbone: the trunk.
      tail: the end that predicts scales, with `head`.
      masks: the end that predicts masked tokens, with `mask_head`.
      refine: of every scale, how many tokens stay as first drawn, and how many are drawn anew by each further step, the
        least certain ones last; () or a shorter tuple draws nothing anew. May be changed without training.
      branches: what is trained: "scales", "masks" or both.
      others: as in `Causal`.
    Source: HMAR (arXiv:2506.04421).
    """

    tail: AdaLN | None = None
    masks: AdaLN | None = None
    mask_head: Categorical = Categorical()
    refine: tuple[tuple[int, ...], ...] = ()
    branches: tuple[Literal["scales", "masks"], ...] = BRANCHES

    adjustable = ("refine",)
    parses = False

    def complete(self, spec: TokenSpec, info: Info) -> "Hmar":
        for name in ("backbone", "tail", "masks"):
            net = getattr(self, name)
            if not isinstance(net, AdaLN) or net.sees != "step" or net.final == (name == "backbone"):
                raise ValueError(
                    f"generator.{name} must be an AdaLN with sees='step' and final={name != 'backbone'}, got {net}"
                )
        if not self.branches or not set(self.branches) <= set(BRANCHES):
            raise ValueError(f"generator.branches is {self.branches}; give one or both of {BRANCHES}")
        return super().complete(spec, info)

    def setup(self):
        super().setup()
        width = self.backbone.width
        self.mask_embed = self.param("mask_embed", jax.nn.initializers.normal((3 * width) ** -0.5), (width,))

    def modulate(self, vector: Array) -> dict[str, Any]:
        nets = {"trunk": self.backbone, "tail": self.tail, "masks": self.masks}
        return {name: net.modulate(vector) for name, net in nets.items()}

    def network(self, x, rows, cond, cache=None, end="tail"):
        x, _ = self.backbone(x, rows, mod=cond.mod["trunk"])
        return getattr(self, end)(x, rows, mod=cond.mod[end])

    @typed
    def loss(
        self,
        tokens: Int[Array, "b s 1"],
        batch: Batch,
        order: Order,
        *,
        drop: Bool[Array, "b"],
        key: PRNGKey | None = None,
        tokenizer: Frozen,
    ) -> tuple[Float[Array, "b m"], Float[Array, "b m"], Metrics]:
        """Teacher forcing of the branches in training; losses of both lie side by side, with equal weight in all.

        Every update masks its own part of the tokens, the same in all images; without a key always the same.
        """
        found, metrics = [], {}
        if "scales" in self.branches or self.is_initializing():
            loss, weight, more = super().loss(tokens, batch, order, drop=drop, tokenizer=tokenizer)
            found.append((loss, weight))
            metrics |= more
        if "masks" in self.branches or self.is_initializing():
            masked = draw_masked(self.spec, jax.random.key(0) if key is None else key)[order.slot]
            target = to_ranks(tokens, order)
            h = self.masked_hidden(target, masked, self.condition(batch, drop), order, tokenizer)
            loss = self.mask_head.loss(h, target)
            weight = image_weight(batch, len(tokens))[:, None] * masked
            found.append((loss, weight))
            metrics["masked_perplexity"] = jnp.exp((loss * weight).sum() / jnp.maximum(weight.sum(), 1))
        loss = jnp.concatenate([loss for loss, _ in found], axis=1)
        counted = image_weight(batch, len(tokens)).sum()
        shares = [counted * weight / jnp.maximum(weight.sum(), 1e-9) for _, weight in found]
        return loss, jnp.concatenate(shares, axis=1), metrics

    def masked_hidden(
        self, tokens: Int[Array, "b n 1"], masked: Bool[Array, "#b n"], cond: Cond, order: Order, tokenizer: Frozen
    ) -> Float[Array, "b n d"]:
        """Hidden row of every rank for masked prediction; of the first scale they mean nothing."""
        return self.masked_rows(tokens, masked, cond, order, tokenizer, 0, order.n)

    def masked_rows(self, tokens, masked, cond, order, tokenizer, first, size):
        known = self.inputs.context(tokens, order, tokenizer, first, size)
        own = some(to_ranks(tokenizer(to_slots(tokens, order), method="own"), order), first, size)
        word = self.inputs.word
        x = jnp.where(masked[..., None], word(known) + self.mask_embed, word(known + own))
        x, coords = self.inputs.place(x, cond, order, first, size)
        h, _ = self.network(x, Rows(order.step[first : first + size], coords), cond, end="masks")
        return h

    def step(self, state: State, now: Step, setting: Setting) -> State:
        """Reveals a scale, then draws its least certain tokens anew in the steps that `refine` says.

        Redrawing is unguided: the published model guides it by a millionth, which changes no more than rounding does.
        """
        counts, knobs, keys = self._counts(now.i, now.size), setting.knobs, now.keys
        if not counts:
            return super().step(state, now, setting)
        if knobs.soften is not None:
            raise ValueError("soft draws mixtures of codes, but refine masks codes; give one of them")
        images = len(keys)
        ways = len(setting.cond.rows) // images
        h, cache = self.rows(state, now.first, now.size, setting)
        logits = self.head.filtered(h, images, knobs, now.i)
        token = self.head.draw(logits, keys, knobs, now.i)
        certain = _probability(logits, token)
        masked = _least(certain, sum(counts))
        unguided = knobs.replace(guidance=jnp.ones_like(jnp.asarray(knobs.guidance)))
        one = setting.replace(cond=jax.tree.map(lambda x: x[::ways], setting.cond))
        tokens = lax.dynamic_update_slice_in_dim(state.tokens, token, now.first, axis=1)
        for j in range(len(counts)):
            h = self.masked_rows(tokens, masked, one.cond, one.order, one.tokenizer, now.first, now.size)
            logits = self.mask_head.filtered(h, images, unguided, now.i)
            again = jax.vmap(jax.vmap(lambda key, j=j: jax.random.fold_in(key, j)))(keys)
            drawn = self.mask_head.draw(logits, again, unguided, now.i)
            token = jnp.where(masked[..., None], drawn, token)
            tokens = lax.dynamic_update_slice_in_dim(tokens, token, now.first, axis=1)
            masked = _least(jnp.where(masked, _probability(logits, token), jnp.inf), sum(counts[j + 1 :]))
        return State(tokens, cache)

    @nn.nowrap
    def calls(self, order: Order) -> dict[str, np.ndarray]:
        return {"generator": np.array([1 + len(self._counts(i, size)) for i, size in enumerate(order.sizes)])}

    @nn.nowrap
    def _counts(self, i: Index, size: int) -> tuple[int, ...]:
        """How many tokens of step `i` each further step draws anew."""
        if not self.refine:
            return ()
        if not isinstance(i, int):
            raise ValueError(f"refine needs scales of different sizes, but several have {size} tokens")
        counts = self.refine[i] if i < len(self.refine) else ()
        if counts and (sum(counts) != size or min(counts) < 0):
            raise ValueError(f"refine has {counts} for scale {i}, which must sum to its {size} tokens")
        return tuple(counts[1:])


def draw_masked(spec: TokenSpec, key: PRNGKey) -> Bool[Array, "n"]:
    """Slots that an update masks: of every scale but the first the same random part, rounded up."""
    part_key, place_key = jax.random.split(key)
    part, noise = jax.random.uniform(part_key), jax.random.uniform(place_key, (spec.n,))
    level, masked = spec.coords[:, 0], []
    for i, (height, width) in enumerate(spec.scales):
        place = jnp.argsort(jnp.argsort(noise[np.flatnonzero(level == i)]))
        masked.append((place < jnp.ceil(part * height * width)) & (i > 0))
    return jnp.concatenate(masked)


def _probability(logits: Float[Array, "b m v"], token: Int[Array, "b m 1"]) -> Float[Array, "b m"]:
    return jnp.take_along_axis(jax.nn.softmax(logits), token, axis=-1)[..., 0]


def _least(certain: Float[Array, "b m"], count: int) -> Bool[Array, "b m"]:
    return jnp.argsort(jnp.argsort(certain, stable=True), stable=True) < count
