"""Pre-norm transformers of the plain kind: layer norm, attention, two-layer perceptron."""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from ar_jax.machine.sharding import BATCH, Rules, constrain
from ar_jax.nets.attention import Sight, attend, sight, visible
from ar_jax.nets.linear import Linear
from ar_jax.nets.mlp import xavier
from ar_jax.nets.transformer import Backbone, Cache
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Bool, Float, Index, Int, typed


class Block(nn.Module):
    """Attention and a two-layer perceptron, each after a norm.

    Attributes:
      bias: of attention and norms, as in ViT, with the exact GELU; without them the GELU is the approximate one.
    """

    width: int
    heads: int
    hidden: int
    dropout: float
    attention_dropout: float
    bias: bool
    dtype: Any
    output_major: bool

    def setup(self):
        def dense(features, bias=True):
            return Linear(features, self.dtype, None, xavier, self.output_major, bias)

        self.attention_norm, self.mlp_norm = (_norm(self.dtype, self.bias) for _ in range(2))
        self.qkv, self.out = dense(3 * self.width, self.bias), dense(self.width, self.bias)
        self.fc1, self.fc2 = dense(self.hidden), dense(self.width)
        self.drop, self.attention_drop = nn.Dropout(self.dropout), nn.Dropout(self.attention_dropout)

    def __call__(self, x, cache, seen, first):
        det = not self.has_rng("dropout")
        x = constrain(x, BATCH)
        qkv = self.qkv(self.attention_norm(x)).reshape(*x.shape[:2], self.heads, 3, -1)
        q, k, v = jnp.moveaxis(qkv, (3, 2), (0, 2))  # three of [B h q e]
        if cache is not None:
            k, v = (lax.dynamic_update_slice_in_dim(old, new, first, axis=2) for old, new in zip(cache, (k, v)))
            cache = (k, v)
        if det or not self.attention_dropout:
            out = seen(q, k, v)
        else:
            out = attend(q, k, v, seen.mask, drop=functools.partial(self.attention_drop, deterministic=False))
        x = x + self.drop(self.out(jnp.moveaxis(out, 1, 2).reshape(x.shape)), deterministic=det)
        y = self.drop(nn.gelu(self.fc1(self.mlp_norm(x)), approximate=not self.bias), deterministic=det)
        return x + self.drop(self.fc2(y), deterministic=det), cache


class Plain(Backbone):
    """A stack of `Block`s and a final norm.

    Attributes:
      layers, width, heads: sizes.
      hidden: width of the perceptrons; 0 is 4 times `width`.
      dropout: rate after attention and in the perceptron; active only when a "dropout" key is given to `apply`.
      attention_dropout: rate of the attention's weights, active with the other.
      dtype, remat, unroll: see `Backbone`.
    """

    hidden: int = 0
    dropout: float = 0.0
    attention_dropout: float = 0.0

    @nn.nowrap
    def blocks_with(self, bias: bool) -> Any:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of the number of heads {self.heads}")
        sizes = (
            self.width, self.heads, self.hidden or 4 * self.width, self.dropout, self.attention_dropout, bias,
            self.dtype, self.unroll,
        )  # fmt: skip
        return self.stack(Block, sizes, (nn.broadcast, nn.broadcast))

    @nn.nowrap
    def sight(self, step: Array, keys: Array | None, first: Index, valid: Array | None) -> Sight:
        if self.attention_dropout and self.has_rng("dropout"):  # kernels do not drop weights
            return Sight(visible(step, step if keys is None else keys, first, valid))
        return sight(step, keys, first, valid)

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        # Outputs of qkv lie head by head (query, key, value of a head side by side), so that whole heads are divided.
        outputs, inputs = (P("tp", None), P(None, "tp")) if self.unroll else (P(None, "tp"), P("tp", None))
        where = r"/blocks(_\d+)?/"
        return (
            (where + r"(qkv|fc1)/kernel$", outputs),
            (where + r"(qkv|fc1)/bias$", P("tp")),
            (where + r"(out|fc2)/kernel$", inputs),
        )


class ViT(Plain):
    """Every row sees every row; they come with their positions added. Attributes: see `Plain`.

    Source: ViT (arXiv:2010.11929).
    """

    def setup(self):
        self.blocks, self.norm = self.blocks_with(bias=True), _norm(self.dtype)

    @typed
    def __call__(self, x: Float[Array, "B q d"], *, valid: Bool[Array, "#B q"] | None = None) -> Float[Array, "B q d"]:
        """Runs all layers; rows that are not `valid` are seen by nobody else."""
        if valid is not None:
            valid = jnp.broadcast_to(valid, x.shape[:2])
        seen = self.sight(np.zeros(x.shape[1], np.int32), None, 0, valid)
        x, _ = self.run(self.blocks, x.astype(self.dtype), None, (), (seen, 0))
        return self.norm(x)


class GPT(Plain):
    """Rows see those of no later step; learned positions of the sequence are added to them. Has no biases in attention.

    Attributes:
      rows: of the longest sequence; 0 is one for the condition and one for each token, once they are known (`complete`).
      others: see `Plain`.
    Source: GIVT (arXiv:2312.02116).
    """

    rows: int = 256

    def complete(self, spec: TokenSpec) -> "GPT":
        return self if self.rows else self.clone(rows=spec.n + 1)

    def setup(self):
        self.blocks, self.norm = self.blocks_with(bias=False), _norm(self.dtype)
        self.positions = self.param("positions", nn.initializers.normal(self.width**-0.5), (self.rows, self.width))

    @typed
    def __call__(
        self,
        x: Float[Array, "B q d"],
        step: Int[Array, "q"],
        coords: Int[Array, "#B q 3"],
        *,
        mod: None = None,
        valid: Bool[Array, "B r"] | None = None,
        cache: Cache | None = None,
        first: Index = 0,
        keys: Int[np.ndarray, "r"] | None = None,
    ) -> tuple[Float[Array, "B q d"], Cache | None]:
        """Runs rows `first..first+q` of a sequence; see `Transformer`. `coords` are unused."""
        if (rows := x.shape[1] if keys is None else len(keys)) > self.rows:
            raise ValueError(
                f"backbone.rows is {self.rows}, but the sequence has {rows}; they are condition and tokens"
            )
        x = x.astype(self.dtype) + lax.dynamic_slice_in_dim(self.positions, first, x.shape[1]).astype(self.dtype)
        seen = self.sight(step, None if cache is None else keys, first, valid)
        x, cache = self.run(self.blocks, x, cache, (), (seen, first))
        return self.norm(x), cache


def _norm(dtype, bias=True):
    # use_fast_variance loses digits where the mean is large against the spread
    return nn.LayerNorm(epsilon=1e-6, use_bias=bias, dtype=dtype, use_fast_variance=False)
