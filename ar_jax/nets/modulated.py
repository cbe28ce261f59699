"""The Llama-like transformer whose norms a condition's vector modulates."""

import flax.linen as nn
import jax.numpy as jnp

from ar_jax.machine.sharding import BATCH, constrain
from ar_jax.nets import transformer
from ar_jax.nets.adaln import Modulation, Projections
from ar_jax.nets.attention import Rows
from ar_jax.nets.positions import rotary
from ar_jax.nets.transformer import Cache, RMSNorm, Transformer
from ar_jax.typing import Array, Float, typed


class Block(transformer.Block):
    """Attention and SwiGLU, each between a modulated norm and a gate."""

    def __call__(self, x, cache, mod, table, seen, first):
        det = not self.has_rng("dropout")
        x = constrain(x, BATCH)
        gate1, gate2, scale1, scale2, shift1, shift2 = jnp.moveaxis(mod[:, :, None], 1, 0)
        out, cache = self.attend(_shifted(self.attention_norm(x), scale1, shift1), cache, table, seen, first)
        x = (x + gate1 * self.drop(out, deterministic=det)).astype(x.dtype)
        y = _shifted(self.mlp_norm(x), scale2, shift2)
        y = self.drop(self.down(nn.silu(self.gate(y)) * self.up(y)), deterministic=det)
        return (x + gate2 * y).astype(x.dtype), cache


class Modulated(Transformer):
    """A stack of `Block`s with two-dimensional rotary positions and a last modulated norm.

    Attributes:
      gate_size: initial size of the gates, relative to that of other projections.
      others: see `Transformer`.
    Source: IBQ (arXiv:2412.02692).
    """

    gate_size: float = 1e-3

    def setup(self):
        hidden = self.hidden or -(-(8 * self.width // 3) // 256) * 256
        sizes = (self.width, self.heads, hidden, self.dropout, self.eps, self.dtype)
        self.blocks = self.stack(Block, sizes, (0, nn.broadcast, nn.broadcast, nn.broadcast))
        parts = (self.gate_size, self.gate_size, 0.5, 0.5, 0.5, 0.5)
        self.ada, self.ada_final = (
            Projections(self.layers, parts, 0.02, self.dtype),
            Projections(1, (0.5, 0.5), 0.02, self.dtype),
        )
        self.norm = RMSNorm(self.eps)

    def modulate(self, vector: Float[Array, "B d"] | None) -> Modulation:
        """What the condition's vector does to this network, computed once for all layers and steps.

        Raises:
          ValueError: the conditioning makes none.
        """
        if vector is None:
            raise ValueError("this backbone is modulated by a vector, which the conditioning does not make; use Label")
        vector = nn.silu(vector.astype(jnp.float32))
        return Modulation(self.ada(vector), self.ada_final(vector)[:, 0])

    @typed
    def __call__(
        self, x: Float[Array, "B q d"], rows: Rows, *, mod: Modulation, cache: Cache | None = None
    ) -> tuple[Float[Array, "B q d"], Cache | None]:
        """Runs some rows of a sequence; see `Transformer`."""
        table = rotary(rows.coords, self.width // self.heads, self.base)
        each = (jnp.moveaxis(mod.blocks, 1, 0),)
        x, cache = self.run(self.blocks, x.astype(self.dtype), cache, each, (table, rows.sight(), rows.first))
        return _shifted(self.norm(x), *jnp.moveaxis(mod.final[:, :, None], 1, 0)), cache


def _shifted(y: Array, scale: Array, shift: Array) -> Array:
    """y (1 + scale) + shift in float32, in the dtype of y."""
    return (y.astype(jnp.float32) * (1 + scale) + shift).astype(y.dtype)
