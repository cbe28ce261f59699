"""Meissonic: MaskGIT from text, by a network of two streams that is told how much is hidden and how the image was cut."""

import math
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from flax import struct

from ar_jax.data import Info
from ar_jax.generators.base import Setting, Step
from ar_jax.generators.maskgit import MaskGIT, State, mask_ratio
from ar_jax.nets.conditioning import Captioned, Cond, widen
from ar_jax.nets.linear import Linear, look_up
from ar_jax.nets.mlp import sinusoids, xavier
from ar_jax.nets.multimodal import MultiModal
from ar_jax.nets.transformer import RMSNorm
from ar_jax.tokenizers.continuous import patchify, unpatchify
from ar_jax.tokens import TokenSpec, grid
from ar_jax.typing import Array, Batch, Bool, Float, Index, Int, Many, Share, typed


class Prompt(Captioned):
    """A caption as rows, the caption in one vector, and numbers that say how the image was made.

    Attributes:
      width: of the network.
      rows: caption rows; 0 until the data is known (`complete`).
      features: width of the caption features; 0 until the data is known.
      pooled: numbers of the vector, `batch["pooled"]`; 0 is the last of the caption's rows, which then is none of the others:
        the closing token of encoders, or whatever a file of features has there.
      micro: the image's width and height before it was cut, where the cut begins from above and from the left (pixels), and a
        score of how people like it, of images whose `batch["micro"]` says nothing else.
      dtype: of the matrix products.
    Source: Meissonic (arXiv:2410.08261); the numbers are SDXL's micro-conditions (arXiv:2307.01952).
    """

    width: int
    rows: int = 0
    features: int = 0
    pooled: Many = 0
    micro: tuple[float, float, float, float, float] = (1024.0, 1024.0, 0.0, 0.0, 6.0)
    dtype: Any = jnp.float32
    eps: float = 1e-6

    def complete(self, info: Info) -> "Prompt":
        found = super().complete(info)
        if info.text_rows < 2 and not self.pooled:
            raise ValueError(f"data.text_rows is {info.text_rows}; Prompt needs 2 or more, the last of which is its vector")
        return found

    def example(self) -> Batch:
        return super().example() | ({"pooled": jnp.zeros((1, self.pooled))} if self.pooled else {})

    @nn.compact
    @typed
    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Cond:
        """Of `batch["text"]`, float [b p c], and `batch["text_mask"]`, bool [b p], which marks the rows that are seen.

        Where `drop` is set no row is seen and the vector is zero, or both are of `batch["unlike"]`: a batch of the same entries,
        which says what images shall not be.
        """

        def dense(name, bias):
            return Linear(self.width, self.dtype, None, xavier, bias=bias, name=name)

        said = self.said(batch)
        unlike = self.said(batch["unlike"]) if "unlike" in batch else (0.0, 0.0, said[2], False)
        text, pooled, micro, valid = (
            jnp.where(drop.reshape(-1, *[1] * (x.ndim - 1)), other, x) for x, other in zip(said, unlike)
        )
        rows = RMSNorm(self.eps, name="norm")(dense("text", True)(text))
        vector = jnp.concatenate([pooled, sinusoids(micro).reshape(len(drop), -1)], axis=-1)
        for i, bias in ((1, False), (2, False), (3, True), (4, True)):  # two perceptrons, one after the other
            vector = dense(f"fc{i}", bias)(nn.silu(vector) if i in (2, 4) else vector)
        return Cond(rows, valid, vector)

    @nn.nowrap
    def said(self, batch: Batch) -> tuple[Float[Array, "b p c"], Float[Array, "b e"], Float[Array, "b 5"], Bool[Array, "b p"]]:
        """Rows, vector, micro-conditions, and which rows are seen."""
        text, valid = jnp.asarray(batch["text"], jnp.float32), jnp.asarray(batch["text_mask"], bool)
        micro = jnp.broadcast_to(jnp.asarray(batch.get("micro", self.micro), jnp.float32), (len(text), 5))
        if self.pooled:
            if "pooled" not in batch:
                raise ValueError(f"conditioning.pooled is {self.pooled}, but the batch has no `pooled`; give float [b {self.pooled}]")
            return text, jnp.asarray(batch["pooled"], jnp.float32), micro, valid
        return text[:, :-1], text[:, -1], micro, valid[:, :-1]


@struct.dataclass
class Told:
    """What modulates the network.

    Attributes:
      vector: [B d], of the condition.
      time: float32 [], or None where it is of what is hidden.
    """

    vector: Array
    time: Array | None = None


class Meissonic(MaskGIT):
    """`MaskGIT` from text: text and image attend together, and a time says how much is hidden.

    Attributes:
      backbone: the network; rows of the condition are as wide.
      joined: four neighbouring places are one row of the network, a quarter of the rows; sides of the grid are even.
      vocabulary: rows of the table of codes, of which hidden ones have the last; 0 is no more than needed.
      clock: the time is 1000 times the part that is hidden ("rate"), in training and in sampling; or as published ("steps"): a
        million times that part in training, a thousand times the steps that are still to come in sampling.
      choice, choice_end: size of the noise in the first and in the last step, evenly in between.
      others: see `MaskGIT`; `noise` means nothing.
    Source: Meissonic (arXiv:2410.08261).
    """

    backbone: MultiModal
    choice: float = 2.0
    most: Share = 1.0
    joined: bool = False
    vocabulary: Many = 0
    clock: Literal["rate", "steps"] = "rate"
    choice_end: float = 0.0

    adjustable = ("choice", "choice_end")

    def on(self, spec: TokenSpec) -> "Meissonic":
        found = super().on(spec)
        if not spec.codes or len(spec.scales) != 1 or math.prod(spec.scales[0]) != spec.n:
            raise ValueError(f"Meissonic needs one full grid of codes, but the tokenizer gives codes {spec.codes} in {spec.scales}")
        if self.joined and any(side % 2 for side in spec.scales[0]):
            raise ValueError(
                f"generator.joined makes one row of four places, but the grid is {spec.scales[0]}; give even sides, or joined False"
            )
        if 0 < self.vocabulary <= spec.codes[0]:
            raise ValueError(
                f"generator.vocabulary is {self.vocabulary}; it must be 0 or more than the {spec.codes[0]} codes"
            )
        return found

    def setup(self):
        net = self.backbone
        norm, dense = lambda: RMSNorm(net.eps), lambda wide=1: Linear(wide * net.width, net.dtype, None, xavier)
        rows = self.vocabulary or self.spec.codes[0] + 1
        self.embedding = self.param("embedding", nn.initializers.normal(0.02), (rows, net.width))
        self.token_norm, self.token = norm(), dense()
        if self.joined:
            self.join_norm, self.join, self.part_norm, self.part = norm(), dense(), norm(), dense(4)
        self.input_norm, self.input, self.output_norm, self.output = norm(), dense(), norm(), dense()
        self.head_input, self.head_norm = dense(), norm()

    @nn.nowrap
    def drawn_mask(self, progress: Float[Array, "b 1"], scores: Float[Array, "b n"]) -> Bool[Array, "b n"]:
        ratio = mask_ratio(self.most * progress, self.curve)
        return jnp.argsort(scores, axis=1) < jnp.maximum(jnp.round(ratio * scores.shape[1]), 1)

    def modulate(self, vector: Float[Array, "B d"]) -> Told:
        return Told(vector)

    @typed
    def hidden(self, tokens: Int[Array, "b n 1"], hidden: Bool[Array, "b n"], cond: Cond) -> Float[Array, "B n d"]:
        """Hidden row of every slot; see `MaskGIT`. The time is that of `cond.mod`, or of what is hidden."""
        ways, size, coords = len(cond.rows) // len(tokens), self.spec.scales[0], self.spec.coords
        time = cond.mod.time
        if time is None:
            time = hidden.mean(1) * (1e3 if self.clock == "rate" else 1e6)
        x = self.embed(tokens, hidden)
        if self.joined:
            size = (size[0] // 2, size[1] // 2)
            x = self.join(patchify(self.join_norm(x).reshape(len(x), *self.spec.scales[0], -1), 2))
            coords = grid(*size)
        x = widen(self.input(self.input_norm(x)), ways)
        time = widen(jnp.broadcast_to(time, len(tokens)).astype(jnp.float32), ways)
        x = self.backbone(x, cond.rows, coords, time=time, vector=cond.mod.vector, valid=cond.valid)
        x = self.output(self.output_norm(x))
        if self.joined:
            x = unpatchify(self.part(self.part_norm(x)), size, 2).reshape(len(x), self.spec.n, -1)
        return self.head_norm(self.head_input(x))

    def embed(self, tokens: Int[Array, "b n 1"], hidden: Bool[Array, "b n"]) -> Float[Array, "b n d"]:
        code = jnp.where(hidden, len(self.embedding) - 1, tokens[..., 0])
        return self.token(self.token_norm(look_up(self.embedding, code)))

    def step(self, state: State, now: Step, setting: Setting) -> State:
        if self.clock == "steps":
            left = jnp.float32(1e3) * (len(setting.order.sizes) - 1 - now.i)
            setting = setting.replace(cond=setting.cond.replace(mod=setting.cond.mod.replace(time=left)))
        return super().step(state, now, setting)

    @nn.nowrap
    def noise_of(self, i: Index, setting: Setting) -> Float[Array, ""]:
        share = i / max(len(setting.order.sizes) - 1, 1)
        return jnp.asarray(self.choice * (1 - share) + self.choice_end * share)
