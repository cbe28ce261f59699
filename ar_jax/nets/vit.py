"""The transformer of vision networks: every row sees every row."""

import functools
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from ar_jax.nets.attention import Sight, attend, sight, visible
from ar_jax.nets.linear import PRODUCT
from ar_jax.nets.mlp import norm, xavier
from ar_jax.nets.transformer import REMAT
from ar_jax.sharding import BATCH, Rules, constrain
from ar_jax.typing import Array, Bool, Float, typed


class Block(nn.Module):
    """Pre-norm attention and a two-layer perceptron with the exact GELU, all with biases."""

    width: int
    heads: int
    hidden: int
    dropout: float
    attention_dropout: float
    dtype: Any

    def setup(self):
        def dense(features):
            return nn.Dense(features, dtype=self.dtype, kernel_init=xavier)

        self.attention_norm, self.mlp_norm = norm(None, self.dtype), norm(None, self.dtype)
        self.qkv, self.out = dense(3 * self.width), dense(self.width)
        self.fc1, self.fc2 = dense(self.hidden), dense(self.width)
        self.drop, self.attention_drop = nn.Dropout(self.dropout), nn.Dropout(self.attention_dropout)

    def __call__(self, x, seen):
        det = not self.has_rng("dropout")
        x = constrain(x, BATCH)
        qkv = checkpoint_name(self.qkv(self.attention_norm(x)), PRODUCT)
        q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], self.heads, 3, -1), (3, 2), (0, 2))  # three of [B h q e]
        if det or not self.attention_dropout:
            out = seen(q, k, v)
        else:
            out = attend(q, k, v, seen.mask, drop=functools.partial(self.attention_drop, deterministic=False))
        out = self.out(jnp.moveaxis(out, 1, 2).reshape(x.shape))
        x = x + self.drop(checkpoint_name(out, PRODUCT), deterministic=det)
        y = checkpoint_name(self.fc1(self.mlp_norm(x)), PRODUCT)
        y = self.drop(nn.gelu(y, approximate=False), deterministic=det)
        return x + self.drop(checkpoint_name(self.fc2(y), PRODUCT), deterministic=det), None


class ViT(nn.Module):
    """A stack of `Block`s and a final norm, over rows that come with their positions added.

    Attributes:
      layers, width, heads: sizes.
      hidden: width of the perceptrons; 0 is 4 times `width`.
      dropout: rate after attention and in the perceptron; active only when a "dropout" key is given to `apply`.
      attention_dropout: rate of the attention's weights, active with the other.
      dtype: of the matrix products; parameters stay float32.
      remat: as in `Transformer`.
    Source: ViT (arXiv:2010.11929).
    """

    layers: int
    width: int
    heads: int
    hidden: int = 0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: Any = jnp.float32
    remat: Literal["none", "dots", "full"] = "none"

    def setup(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of the number of heads {self.heads}")
        if self.remat not in ("none", *REMAT):
            raise ValueError(f"remat is {self.remat!r}; it must be one of none, {', '.join(REMAT)}")
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=REMAT[self.remat])
        self.blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=self.layers,
        )(self.width, self.heads, self.hidden or 4 * self.width, self.dropout, self.attention_dropout, self.dtype)
        self.norm = norm(None, self.dtype)

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        # Outputs of qkv lie head by head (query, key, value of a head side by side), so that whole heads are divided.
        return (
            (r"/blocks/(qkv|fc1)/kernel$", P(None, "tp")),
            (r"/blocks/(qkv|fc1)/bias$", P("tp")),
            (r"/blocks/(out|fc2)/kernel$", P("tp", None)),
        )

    @typed
    def __call__(self, x: Float[Array, "B q d"], *, valid: Bool[Array, "#B q"] | None = None) -> Float[Array, "B q d"]:
        """Runs all layers; rows that are not `valid` are seen by nobody else."""
        steps = np.zeros(x.shape[1], np.int32)
        if valid is not None:
            valid = jnp.broadcast_to(valid, x.shape[:2])
        if self.attention_dropout and self.has_rng("dropout"):
            seen = Sight(visible(steps, steps, valid=valid))  # kernels do not drop weights
        else:
            seen = sight(steps, valid=valid)
        x, _ = self.blocks(x.astype(self.dtype), seen)
        return self.norm(x)
