"""The transformer of two streams, a text's and an image's, which attend together: blocks with weights for each, then common ones."""

from typing import Annotated, Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from ar_jax.machine.sharding import BATCH, Rules, constrain
from ar_jax.nets.adaln import modulated
from ar_jax.nets.attention import Rows, join_heads, split_heads
from ar_jax.nets.linear import Linear
from ar_jax.nets.mlp import TimeEmbedding, xavier, zeros
from ar_jax.nets.positions import rotary_axes, rotate
from ar_jax.nets.transformer import Backbone, RMSNorm
from ar_jax.typing import Array, Bool, Float, Int, Layers, Many, Within, typed


class Heads(nn.Module):
    """Queries, keys and values of rows, head by head; queries and keys are normalised."""

    width: int
    heads: int
    eps: float
    dtype: Any

    def setup(self):
        self.query, self.key, self.value = (
            Linear(self.width, self.dtype, None, xavier, bias=True) for _ in range(3)
        )
        self.query_norm, self.key_norm = RMSNorm(self.eps), RMSNorm(self.eps)

    def __call__(self, y):
        q, k, v = (split_heads(net(y), self.heads, 1)[0] for net in (self.query, self.key, self.value))
        return self.query_norm(q), self.key_norm(k), v


class Stream(nn.Module):
    """What a `DoubleBlock` does to one of its streams, before and after the attention of both."""

    width: int
    heads: int
    hidden: int
    eps: float
    dtype: Any

    def setup(self):
        def dense(features, begin=xavier):
            return Linear(features, self.dtype, None, begin, bias=True)

        self.modulation = dense(6 * self.width, zeros)
        self.attention = Heads(self.width, self.heads, self.eps, self.dtype)
        self.out, self.fc1, self.fc2 = dense(self.width), dense(self.hidden), dense(self.width)

    def asks(self, x, vector):
        """Queries, keys and values; and what modulates the rest."""
        shift, scale, *rest = parts(self.modulation(vector), 6)
        return self.attention(modulated(x, scale, shift, self.eps)), rest

    def told(self, x, seen, rest):
        gate1, shift, scale, gate2 = rest
        x = (x + gate1 * self.out(seen)).astype(x.dtype)
        y = self.fc2(nn.gelu(self.fc1(modulated(x, scale, shift, self.eps)), approximate=True))
        return (x + gate2 * y).astype(x.dtype)


class DoubleBlock(nn.Module):
    """Attention of text and image together and a perceptron for each, between modulated norms and gates of each stream's own."""

    width: int
    heads: int
    hidden: int
    eps: float
    dtype: Any

    def setup(self):
        fields = (self.width, self.heads, self.hidden, self.eps, self.dtype)
        self.text, self.image = Stream(*fields), Stream(*fields)

    def __call__(self, streams, cache, vector, table, seen):
        text, image = (constrain(x, BATCH) for x in streams)
        (ours, text_rest), (theirs, image_rest) = self.text.asks(text, vector), self.image.asks(image, vector)
        q, k, v = (jnp.concatenate(both, axis=2) for both in zip(ours, theirs))
        y, rows = join_heads(seen(rotate(q, table), rotate(k, table), v)), text.shape[1]
        return (self.text.told(text, y[:, :rows], text_rest), self.image.told(image, y[:, rows:], image_rest)), cache


class SingleBlock(nn.Module):
    """Attention and a perceptron beside it, of the same modulated rows; one product of both comes through a gate."""

    width: int
    heads: int
    hidden: int
    eps: float
    dtype: Any

    def setup(self):
        def dense(features, begin=xavier):
            return Linear(features, self.dtype, None, begin, bias=True)

        self.modulation = dense(3 * self.width, zeros)
        self.attention = Heads(self.width, self.heads, self.eps, self.dtype)
        self.fc1, self.out = dense(self.hidden), dense(self.width)

    def __call__(self, x, cache, vector, table, seen):
        x = constrain(x, BATCH)
        shift, scale, gate = parts(self.modulation(vector), 3)
        y = modulated(x, scale, shift, self.eps)
        q, k, v = self.attention(y)
        y = [join_heads(seen(rotate(q, table), rotate(k, table), v)), nn.gelu(self.fc1(y), approximate=True)]
        return (x + gate * self.out(jnp.concatenate(y, axis=-1))).astype(x.dtype), cache


def parts(mod: Float[Array, "B f"], count: int) -> list[Array]:
    """Shifts, scales and gates, float32 [B 1 d] each."""
    return jnp.split(mod.astype(jnp.float32)[:, None], count, axis=-1)


class MultiModal(Backbone):
    """`DoubleBlock`s, in which text and image have weights of their own, then `SingleBlock`s; a time and a vector modulate all.

    Attributes:
      layers, width, heads: sizes, of the double blocks.
      singles: single blocks.
      hidden: width of the perceptrons; 0 is 4 times `width`.
      axes: channels of a head that turn with the level, the row and the column; even numbers. The text lies at (0, 0, 0).
      base: wave length base of the rotary positions.
      eps: of the norms.
      dtype, remat, unroll: see `Backbone`.
    Source: Stable Diffusion 3 (arXiv:2403.03206); single blocks after them as in Meissonic (arXiv:2410.08261).
    """

    singles: Layers = 1
    hidden: Many = 0
    axes: tuple[Many, Many, Many] = (16, 56, 56)
    base: Annotated[float, Within(1, 2**24)] = 10000.0
    eps: float = 1e-6

    def setup(self):
        if sum(self.axes) * self.heads != self.width or any(size % 2 for size in self.axes):
            raise ValueError(
                f"backbone.axes is {self.axes}; they must be even numbers whose sum is width / heads, "
                f"{self.width} / {self.heads}"
            )
        sizes = (self.width, self.heads, self.hidden or 4 * self.width, self.eps, self.dtype)
        self.double = self.stack(DoubleBlock, sizes, (nn.broadcast,) * 3)
        self.single = self.stack(SingleBlock, sizes, (nn.broadcast,) * 3, self.singles)
        self.time = TimeEmbedding(self.width, self.dtype)

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        outputs, inputs = self.divided
        where = r"/(double|single)(_\d+)?/(\w+/)*"
        return (
            (where + r"(query|key|value|fc1)/kernel$", outputs),
            (where + r"(query|key|value|fc1)/bias$", P("tp")),
            (where + r"(out|fc2)/kernel$", inputs),
        )

    @typed
    def __call__(
        self,
        x: Float[Array, "B q d"],
        text: Float[Array, "B p d"],
        coords: Int[np.ndarray, "q 3"],
        *,
        time: Float[Array, "B"],
        vector: Float[Array, "B d"],
        valid: Bool[Array, "B p"] | None = None,
    ) -> Float[Array, "B q d"]:
        """Runs all layers; every row sees every row.

        Args:
          x: rows of the image.
          text: rows of the text.
          coords: level, row and column of the image's rows.
          time: what the sines of the time are of.
          vector: modulates with the time.
          valid: rows of the text that others may see; None is all.
        """
        rows = text.shape[1]
        table = rotary_axes(np.concatenate([np.zeros((rows, 3), np.int32), coords]), self.axes, self.base)
        if valid is not None:
            valid = jnp.pad(valid, ((0, 0), (0, x.shape[1])), constant_values=True)
        seen = Rows(np.zeros(rows + x.shape[1], np.int32), valid=valid).sight()
        shared = nn.silu((self.time(time) + vector).astype(jnp.float32)), table, seen
        streams, _ = self.run(self.double, (text.astype(self.dtype), x.astype(self.dtype)), None, (), shared)
        x, _ = self.run(self.single, jnp.concatenate(streams, axis=1), None, (), shared)
        return x[:, rows:]
