"""Masked generators: tokens are predicted from any set of known ones, by a network that is run anew in every step."""

import dataclasses
import math
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp

from ar_jax.generators.base import Conditioning, Frozen, Generator, Head, Setting, State, Step, image_weight
from ar_jax.machine.sharding import BATCH, constrain
from ar_jax.nets.conditioning import Cond, widen
from ar_jax.nets.linear import Linear, look_up
from ar_jax.nets.mlp import norm, xavier
from ar_jax.nets.transformer import init
from ar_jax.nets.vit import ViT
from ar_jax.orders import Order, to_ranks, whole
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Batch, Bool, Float, Index, Int, Many, Metrics, PRNGKey, Share, Tokens, Within, typed


@dataclasses.dataclass(frozen=True)
class MaskRatio:
    """Part of the tokens hidden in a training step: a truncated normal number.

    Attributes:
      mean, std: before truncation.
      least: the smallest; the largest is 1.
    """

    mean: float = 1.0
    std: float = 0.25
    least: Share = 0.7

    def draw(self, key: PRNGKey, shape: tuple[int, ...] = ()) -> Float[Array, "*s"]:
        low, high = (self.least - self.mean) / self.std, (1 - self.mean) / self.std
        return self.mean + self.std * jax.random.truncated_normal(key, low, high, shape)


class Masked(Generator):
    """An encoder of the known tokens and a decoder of all places, for any order.

    Inside, tokens are in rank order: the known ones come first, so the encoder is run over no more rows than can be known,
    and rows not yet known are seen by nobody.

    Attributes:
      encoder, decoder: the networks.
      conditioning: makes one row from a batch (`Label`), as wide as the encoder.
      head: turns hidden rows into a distribution over tokens.
      buffer: rows before the tokens; each carries the condition.
      mask: what is hidden in training.
      vectors: numbers of what the tokenizer says a token of codes stands for (`embed`), which then is what comes in; 0
        learns an embedding, for tokens of one code.
      spec: the tokens; None until the tokenizer is known (`complete`).
    Source: MAR (arXiv:2406.11838).
    """

    encoder: ViT
    decoder: ViT
    conditioning: Conditioning
    head: Head
    buffer: Annotated[int, Within(0, 2**24)] = 64
    mask: MaskRatio = MaskRatio()
    vectors: Many = 0
    spec: TokenSpec | None = None

    any_order = True

    def on(self, spec: TokenSpec) -> "Masked":
        if len(spec.codes) > 1 and not self.vectors:
            raise ValueError(
                f"generator.vectors is 0, but the tokenizer gives codes {spec.codes}; give the numbers that its `embed` "
                "shows a token by"
            )
        return super().on(spec)

    def example(self) -> tuple[Order, Frozen]:
        return whole(self.spec), lambda tokens, method: jnp.zeros((*tokens.shape[:2], self.vectors))

    def setup(self):
        rows, wide, width = self.buffer + self.spec.n, self.encoder.width, self.decoder.width
        if self.spec.codes and not self.vectors:
            self.input = nn.Embed(self.spec.codes[0], wide, embedding_init=init)
        else:
            self.input = Linear(wide, self.encoder.dtype, None, xavier, bias=True)
        self.input_norm = norm(None, self.encoder.dtype)
        self.decoder_input = Linear(width, self.decoder.dtype, None, xavier, bias=True)
        self.encoder_positions = self.table("encoder_positions", rows, wide)
        self.decoder_positions = self.table("decoder_positions", rows, width)
        self.head_positions = self.table("head_positions", self.spec.n, width)
        self.mask_token = self.param("mask_token", init, (width,))

    def table(self, name: str, rows: int, width: int) -> Float[Array, "p d"]:
        """Learned positions."""
        return self.param(name, init, (rows, width))

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
        """Prediction of the ranks that are hidden, which are the last ones; how many is drawn once for the batch.

        Args:
          tokens: in slot order.
          batch: the condition, and optionally "valid" [b], the weight of each image (default 1).
          order: whatever its steps.
          drop: images trained without their condition.
          key: for the mask and the head.
          tokenizer: calls a method of the frozen tokenizer; needed with `vectors` only.

        Returns:
          The head's loss and weight of every rank (0 where it is known), and metrics.
        """
        mask_key, head_key = jax.random.split(key)
        n = self.spec.n
        known = n - jnp.ceil(n * self.mask.draw(mask_key)).astype(jnp.int32)
        target = to_ranks(tokens, order)
        most = n - math.ceil(n * self.mask.least)
        h = self.hidden(self.shown(target[:, :most], tokenizer), known, self.condition(batch, drop), order)
        loss = self.head.loss(h, target, key=head_key)
        weight = image_weight(batch, len(tokens))[:, None] * (jnp.arange(n) >= known)
        return loss, weight, {"masked": 1 - known / n}

    def shown(self, tokens: Tokens, tokenizer: Frozen | None) -> Tokens:
        """What the encoder is given of tokens."""
        if not self.vectors:
            return tokens
        found = tokenizer(tokens, method="embed")
        if found.shape[-1] != self.vectors:
            raise ValueError(
                f"generator.vectors is {self.vectors}, but the tokenizer shows a token by {found.shape[-1]} numbers"
            )
        return found

    @typed
    def hidden(
        self, tokens: Int[Array, "b r k"] | Float[Array, "b r k"], known: Int[Array, ""], cond: Cond, order: Order
    ) -> Float[Array, "B n d"]:
        """Hidden row of every rank.

        Args:
          tokens: the first r ranks, as `shown` gives them.
          known: how many of them are known.
          cond: rows of B = b * ways guided images.
          order: gives the places of the ranks.
        """
        h = self.decode(self.encode(tokens, known, cond, order), tokens.shape[1], known, order)
        slots = widen(jnp.asarray(order.slot), len(h) // len(order.slot) if len(order.slot) > 1 else 1)
        return self.told(h, look_up(self.head_positions, slots), cond)

    def told(self, h: Float[Array, "B n d"], positions: Float[Array, "#B n d"], cond: Cond) -> Float[Array, "B n d"]:
        """What the head is given of the decoder's rows and of learned positions."""
        return (h + positions).astype(h.dtype)

    def encode(self, tokens: Array, known: Index, cond: Cond, order: Order) -> Float[Array, "B p d"]:
        """The encoder's rows: the buffer, then the first ranks; those not yet known mean nothing."""
        ways = len(cond.rows) // len(tokens)
        codes = jnp.issubdtype(tokens.dtype, jnp.integer)
        embedded = widen(self.input(tokens[..., 0] if codes else tokens), ways).astype(self.encoder.dtype)
        buffer = jnp.broadcast_to(cond.rows, (len(cond.rows), self.buffer, cond.rows.shape[-1]))
        x = jnp.concatenate([buffer.astype(embedded.dtype), embedded], axis=1)
        x = (x + self._positions(self.encoder_positions, order, len(x))[:, : x.shape[1]]).astype(x.dtype)
        valid = jnp.arange(x.shape[1])[None] < self.buffer + known
        return self.encoder(constrain(self.input_norm(x), BATCH), valid=valid)

    def decode(self, encoded: Float[Array, "B p d"], ranks: int, known: Index, order: Order) -> Float[Array, "B n d"]:
        """The decoder's row of every rank, of the encoder's rows of the first `ranks`."""
        decoded = self.decoder_input(encoded)
        seen = jnp.arange(self.buffer + ranks) < self.buffer + known
        rows = jnp.where(seen[:, None], decoded, self.mask_token.astype(decoded.dtype))
        shape = len(rows), self.spec.n - ranks, rows.shape[-1]
        x = jnp.concatenate([rows, jnp.broadcast_to(self.mask_token.astype(decoded.dtype), shape)], axis=1)
        x = (x + self._positions(self.decoder_positions, order, len(x))).astype(x.dtype)
        return self.decoder(constrain(x, BATCH))[:, self.buffer :]

    def begin(self, setting: Setting, images: int) -> State:
        """Without room for any rank; what lies at ranks not yet revealed is never read."""
        return State(self.spec.zeros(images)[:, :0])

    def grow(self, state: State, ranks: int, setting: Setting) -> State:
        return State(jnp.pad(state.tokens, ((0, 0), (0, ranks - state.tokens.shape[1]), (0, 0))))

    def step(self, state: State, now: Step, setting: Setting) -> State:
        """Draws the ranks of a step from those before; there may be more than the step reveals."""
        known = self.shown(state.tokens, setting.tokenizer)
        h = self.hidden(known, jnp.asarray(now.first, jnp.int32), setting.cond, setting.order)
        ranks = now.first + jnp.arange(now.size)
        drawn = self.head.sample(jnp.take(h, ranks, axis=1, mode="clip"), now.keys, setting.knobs, now.i)
        return State(state.tokens.at[:, ranks].set(drawn, mode="drop"))

    def _positions(self, table, order, rows):
        """Positions of the buffer and of all ranks, [#B p d]."""
        slots = jnp.asarray(order.slot)
        slots = widen(slots, rows // len(slots) if len(slots) > 1 else 1)
        return jnp.concatenate(
            [jnp.broadcast_to(table[: self.buffer], (len(slots), self.buffer, table.shape[-1])),
             look_up(table[self.buffer :], slots)], axis=1,
        )  # fmt: skip
