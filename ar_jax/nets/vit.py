"""Pre-norm transformers of the plain kind: layer norm, attention, two-layer perceptron."""

import functools
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from ar_jax.machine.sharding import BATCH, Rules, constrain
from ar_jax.nets.attention import Rows, attend, join_heads, remember, split_heads
from ar_jax.nets.dropout import Dropout
from ar_jax.nets.linear import Linear
from ar_jax.nets.mlp import xavier
from ar_jax.nets.positions import rotary, rotary_line, rotate
from ar_jax.nets.transformer import Backbone, Cache
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Bool, Float, Int, Share, Within, typed


class Block(nn.Module):
    """Attention and a two-layer perceptron, each after a norm.

    Attributes:
      bias: of attention and norms, as in ViT, with the exact GELU; without them the GELU is the approximate one.
      begin: how kernels begin.
      apart: queries, keys and values have a kernel each, in place of a joint one.
      qkv_bias: whether they have biases where the others do.
    """

    width: int
    heads: int
    hidden: int
    dropout: Share
    attention_dropout: Share
    bias: bool
    eps: float
    dtype: Any
    begin: Any = xavier
    apart: bool = False
    qkv_bias: bool = True

    def setup(self):
        def dense(features, bias=True):
            return Linear(features, self.dtype, None, self.begin, bias)

        self.attention_norm, self.mlp_norm = (_norm(self.dtype, self.bias, self.eps) for _ in range(2))
        self.out = dense(self.width, self.bias)
        if self.apart:
            self.query, self.key, self.value = (dense(self.width, self.bias and self.qkv_bias) for _ in range(3))
        else:
            self.qkv = dense(3 * self.width, self.bias and self.qkv_bias)
        self.fc1, self.fc2 = dense(self.hidden), dense(self.width)
        self.drop, self.attention_drop = Dropout(self.dropout), Dropout(self.attention_dropout)

    def __call__(self, x, cache, seen, first):
        det = not self.has_rng("dropout")
        x = constrain(x, BATCH)
        y, cache = self.attend(self.attention_norm(x), cache, seen, first, det)
        x = x + self.drop(y, deterministic=det)
        return x + self.drop(self.perceptron(self.mlp_norm(x), det), deterministic=det), cache

    def attend(self, y, cache, seen, first, det):
        if self.apart:
            q, k, v = (split_heads(net(y), self.heads, 1)[0] for net in (self.query, self.key, self.value))
        else:
            q, k, v = split_heads(self.qkv(y), self.heads)
        k, v, cache = remember(cache, k, v, first)
        if det or not self.attention_dropout:
            out = seen(q, k, v)
        else:
            out = attend(q, k, v, seen.mask, drop=functools.partial(self.attention_drop, deterministic=False))
        return self.out(join_heads(out)), cache

    def perceptron(self, y, det):
        return self.fc2(self.drop(nn.gelu(self.fc1(y), approximate=not self.bias), deterministic=det))


class Plain(Backbone):
    """A stack of `Block`s and a final norm.

    Attributes:
      layers, width, heads: sizes.
      hidden: width of the perceptrons; 0 is 4 times `width`.
      dropout: rate after attention and in the perceptron; active only when a "dropout" key is given to `apply`.
      attention_dropout: rate of the attention's weights, active with the other.
      eps: of the norms.
      dtype, remat, unroll: see `Backbone`.
    """

    hidden: int = 0
    dropout: Share = 0.0
    attention_dropout: Share = 0.0
    eps: float = 1e-6

    kind = Block

    @nn.nowrap
    def blocks_with(
        self,
        bias: bool,
        begin: Any = xavier,
        apart: bool = False,
        qkv_bias: bool = True,
        kind: Any = None,
        layers: int = 0,
    ) -> Any:
        """Some of the layers, of the class's `kind` or another one; 0 is all."""
        return self.stack(
            kind or self.kind, self.fields_of_block(bias, begin, apart, qkv_bias), (nn.broadcast, nn.broadcast), layers
        )

    @nn.nowrap
    def fields_of_block(self, bias: bool, begin: Any = xavier, apart: bool = False, qkv_bias: bool = True) -> tuple:
        return (
            self.width, self.heads, self.hidden or 4 * self.width, self.dropout, self.attention_dropout, bias,
            self.eps, self.dtype, begin, apart, qkv_bias,
        )  # fmt: skip

    @nn.nowrap
    def look(self, blocks: Any, x: Array, rows: Rows, cache: Cache | None = None) -> tuple[Array, Cache | None]:
        """Rows through all layers."""
        seen = rows.sight(masked=self.attention_dropout > 0 and self.has_rng("dropout"))  # kernels do not drop weights
        return self.run(blocks, x.astype(self.dtype), cache, (), (seen, rows.first))

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        outputs, inputs = self.divided
        where = r"/blocks(_\d+)?/"
        return (
            (where + r"(qkv|query|key|value|fc1)/kernel$", outputs),
            (where + r"(qkv|query|key|value|fc1)/bias$", P("tp")),
            (where + r"(out|fc2)/kernel$", inputs),
        )


class ViT(Plain):
    """Every row sees every row; they come with their positions added. Attributes: see `Plain`.

    Source: ViT (arXiv:2010.11929).
    """

    def setup(self):
        self.blocks, self.norm = self.blocks_with(bias=True), _norm(self.dtype, eps=self.eps)

    @typed
    def __call__(self, x: Float[Array, "B q d"], *, valid: Bool[Array, "#B q"] | None = None) -> Float[Array, "B q d"]:
        """Runs all layers; rows that are not `valid` are seen by nobody else."""
        if valid is not None:
            valid = jnp.broadcast_to(valid, x.shape[:2])
        return self.norm(self.look(self.blocks, x, Rows(np.zeros(x.shape[1], np.int32), valid=valid))[0])


class ClipViT(ViT):
    """A ViT with a norm before the layers too.

    Attributes:
      std: of the kernels at the start; larger ones suit networks much narrower than the published.
      others: see `Plain`.
    Source: CLIP (arXiv:2103.00020), as in TiTok (arXiv:2406.07550).
    """

    eps: float = 1e-5
    std: float = 0.02

    def setup(self):
        self.before, self.norm = (_norm(self.dtype, eps=self.eps) for _ in range(2))
        self.blocks = self.blocks_with(bias=True, begin=nn.initializers.normal(self.std))

    @typed
    def __call__(self, x: Float[Array, "B q d"], *, valid: Bool[Array, "#B q"] | None = None) -> Float[Array, "B q d"]:
        return super().__call__(self.before(x), valid=valid)


class SiglipBlock(Block):
    """As `Block`, with the approximate GELU."""

    def perceptron(self, y, det):
        return self.fc2(self.drop(nn.gelu(self.fc1(y), approximate=True), deterministic=det))


class Siglip(Plain):
    """Rows see those of no later step; they come with their positions added. Attributes: see `Plain`.

    Source: the towers of SigLIP 2 (arXiv:2502.14786), without the pooling head.
    """

    kind = SiglipBlock

    def setup(self):
        self.blocks, self.norm = self.blocks_with(bias=True, apart=True), _norm(self.dtype, eps=self.eps)

    @typed
    def __call__(
        self, x: Float[Array, "B q d"], step: Int[np.ndarray, "q"], *, valid: Bool[Array, "B q"] | None = None
    ) -> Float[Array, "B q d"]:
        """Runs all layers; rows that are not `valid` are seen by nobody else."""
        return self.norm(self.look(self.blocks, x, Rows(step, valid=valid))[0])


class TurnedBlock(nn.Module):
    """As `Block`, with rotary positions, a gated perceptron as in T5, and no biases of queries, keys and values."""

    width: int
    heads: int
    hidden: int
    eps: float
    dtype: Any

    def setup(self):
        def dense(features, bias=True):
            return Linear(features, self.dtype, None, xavier, bias)

        self.attention_norm, self.mlp_norm = (_norm(self.dtype, eps=self.eps) for _ in range(2))
        self.qkv, self.out = dense(3 * self.width, bias=False), dense(self.width)
        self.gate, self.up, self.down = dense(self.hidden), dense(self.hidden), dense(self.width)

    def __call__(self, x, cache, table, seen, first):
        x = constrain(x, BATCH)
        q, k, v = split_heads(self.qkv(self.attention_norm(x)), self.heads)
        k, v, cache = remember(cache, rotate(k, table), v, first)
        x = x + self.out(join_heads(seen(rotate(q, table), k, v)))
        y = self.mlp_norm(x)
        return x + self.down(nn.gelu(self.gate(y), approximate=False) * self.up(y)), cache


class TurnedViT(Backbone):
    """A ViT with rotary positions: every row sees every row.

    Attributes:
      layers, width, heads: sizes; width/heads is a multiple of 4.
      hidden: width of the gated perceptrons; 0 is 2.67 times `width`.
      places: pairs of channels turn with the place in raster order ("line"), or half of them with the column and half with
        the row ("grid"). On a line the same two places lie apart by another number in a grid of another width.
      base: wave length base of the rotary positions.
      eps: of the norms.
      dtype, remat, unroll: see `Backbone`.
    Source: ViTok (arXiv:2501.09755).
    """

    hidden: int = 0
    places: Literal["line", "grid"] = "line"
    base: Annotated[float, Within(1, 2**24)] = 10000.0
    eps: float = 1e-5

    turned = True

    def setup(self):
        hidden = self.hidden or int(2.67 * self.width)
        sizes = (self.width, self.heads, hidden, self.eps, self.dtype)
        self.blocks = self.stack(TurnedBlock, sizes, (nn.broadcast,) * 3)
        self.norm = _norm(self.dtype, eps=self.eps)

    @typed
    def __call__(self, x: Float[Array, "B q d"], coords: Int[Array, "q 3"]) -> Float[Array, "B q d"]:
        """Runs all layers on rows that lie at `coords` (level, row, column) of a grid, in raster order."""
        features = self.width // self.heads
        if self.places == "line":
            table = rotary_line(np.arange(x.shape[1], dtype=np.int32)[None], features, self.base)
        elif self.places == "grid":
            table = rotary(coords[None, :, [0, 2, 1]], features, self.base)  # columns come first
        else:
            raise ValueError(f"places is {self.places!r}; it must be line or grid")
        rows = Rows(np.zeros(x.shape[1], np.int32))
        return self.norm(self.run(self.blocks, x.astype(self.dtype), None, (), (table, rows.sight(), rows.first))[0])

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        outputs, inputs = self.divided
        where = r"/blocks(_\d+)?/"
        return (
            (where + r"(qkv|gate|up)/kernel$", outputs),
            (where + r"(gate|up)/bias$", P("tp")),
            (where + r"(out|down)/kernel$", inputs),
        )


class GPT(Plain):
    """Rows see those of no later step; learned positions of the sequence are added to them. Has no biases in attention.

    Attributes:
      rows: of the longest sequence; 0 is one for the condition and one for each token, once they are known (`complete`).
      others: see `Plain`.
    Source: GIVT (arXiv:2312.02116).
    """

    rows: Annotated[int, Within(0, 2**24)] = 256

    def complete(self, spec: TokenSpec) -> "GPT":
        return self if self.rows else self.clone(rows=spec.n + 1)

    def setup(self):
        self.blocks, self.norm = self.blocks_with(bias=False), _norm(self.dtype, eps=self.eps)
        self.positions = self.param("positions", nn.initializers.normal(self.width**-0.5), (self.rows, self.width))

    @typed
    def __call__(
        self, x: Float[Array, "B q d"], rows: Rows, *, mod: None = None, cache: Cache | None = None
    ) -> tuple[Float[Array, "B q d"], Cache | None]:
        """Runs some rows of a sequence; see `Transformer`."""
        x, cache = self.look(self.blocks, x + rows.of(self.positions), rows, cache)
        return self.norm(x), cache


class Successive(Plain):
    """Rows see those of no later step; they come with their positions added, and there is no last norm.

    Attributes: see `Plain`.
    Source: minGPT, as in DQ-VAE (arXiv:2305.11718).
    """

    eps: float = 1e-5

    def setup(self):
        self.blocks = self.blocks_with(bias=True, begin=nn.initializers.normal(0.02), apart=True)

    @typed
    def __call__(
        self, x: Float[Array, "B q d"], rows: Rows, *, mod: None = None, cache: Cache | None = None
    ) -> tuple[Float[Array, "B q d"], Cache | None]:
        """Runs some rows of a sequence; see `Transformer`."""
        return self.look(self.blocks, x, rows, cache)


def _norm(dtype, bias=True, eps=1e-6):
    # use_fast_variance loses digits where the mean is large against the spread
    return nn.LayerNorm(epsilon=eps, use_bias=bias, dtype=dtype, use_fast_variance=False)
