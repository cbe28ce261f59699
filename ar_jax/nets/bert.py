"""Networks of masked generators of codes, in which every row sees every row: BERT's, and the transformer in the form of a U-Net."""

from typing import Annotated

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ar_jax.machine.sharding import Rules
from ar_jax.nets import post_norm, vit
from ar_jax.nets.attention import Rows
from ar_jax.nets.dropout import Dropout
from ar_jax.nets.linear import Linear
from ar_jax.nets.transformer import Cache, init
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Float, Within, typed

Length = Annotated[int, Within(0, 2**24)]


class BertBlock(post_norm.Block):
    """Attention and a two-layer perceptron, each followed by a norm of the sum; nothing is dropped inside the perceptron."""

    def perceptron(self, y, det):
        return self.fc2(nn.gelu(self.fc1(y), approximate=False))


class Bert(vit.Plain):
    """Rows, a learned position of each and a vector that all have, through a norm and a stack of `BertBlock`s.

    Attributes:
      rows: of the longest sequence; 0 is one for the condition and one for each token (`complete`).
      others: see `Plain`.
    Source: BERT (arXiv:1810.04805) as in TiTok (arXiv:2406.07550). Of its table of kinds of text the first row is used.
    """

    rows: Length = 0
    eps: float = 1e-12

    kind = BertBlock

    def complete(self, spec: TokenSpec) -> "Bert":
        return self if self.rows else self.clone(rows=spec.n + 1)

    def setup(self):
        self.blocks = self.blocks_with(bias=True, begin=init, apart=True)
        self.norm = vit._norm(self.dtype, eps=self.eps)
        self.positions = self.param("positions", init, (self.rows, self.width))
        self.kinds = self.param("kinds", init, (2, self.width))
        self.drop = Dropout(self.dropout)

    @typed
    def __call__(
        self, x: Float[Array, "B q d"], rows: Rows, *, mod: Array | None = None, cache: Cache | None = None
    ) -> tuple[Float[Array, "B q d"], Cache | None]:
        """Runs some rows of a sequence; see `Transformer`."""
        x = self.norm(x + rows.of(self.positions) + self.kinds[0])
        return self.look(self.blocks, self.drop(x, deterministic=not self.has_rng("dropout")), rows, cache)


class DownBlock(vit.Block):
    """A block whose rows a later one is given as well."""

    def __call__(self, x, cache, seen, first):
        x, _ = super().__call__(x, cache, seen, first)
        return x, x


class UpBlock(vit.Block):
    """A block that joins its rows with those of an earlier one, side by side."""

    def setup(self):
        super().setup()
        self.join = Linear(self.width, self.dtype, None, self.begin, bias=True)

    def __call__(self, x, earlier, seen, first):
        x = self.join(jnp.concatenate([x, earlier], axis=-1))
        return super().__call__(x, None, seen, first)[0], None


class UViT(vit.Plain):
    """Half of the blocks, one more, and the other half, each of which is given the rows of its mirror image; learned positions.

    Attributes:
      layers: without the one in the middle; an even number.
      rows: see `Bert`.
      others: see `Plain`.
    Source: U-ViT (arXiv:2209.12152) as in TiTok (arXiv:2406.07550).
    """

    rows: Length = 0
    eps: float = 1e-5

    def complete(self, spec: TokenSpec) -> "UViT":
        return self if self.rows else self.clone(rows=spec.n + 1)

    def setup(self):
        if self.layers % 2:
            raise ValueError(
                f"backbone.layers is {self.layers}; a UViT needs an even number, and has one more in the middle"
            )
        how = {"bias": True, "begin": init, "qkv_bias": False}
        self.down = self.blocks_with(**how, kind=DownBlock, layers=self.layers // 2)
        self.middle = vit.Block(*self.fields_of_block(**how))
        self.up = self.blocks_with(**how, kind=UpBlock, layers=self.layers // 2)
        self.norm = vit._norm(self.dtype, eps=self.eps)
        self.positions = self.param("positions", init, (self.rows, self.width))

    @typed
    def __call__(
        self, x: Float[Array, "B q d"], rows: Rows, *, mod: Array | None = None, cache: Cache | None = None
    ) -> tuple[Float[Array, "B q d"], Cache | None]:
        """Runs all rows of a sequence; see `Transformer`.

        Raises:
          ValueError: with a cache, which it does not keep.
        """
        if cache is not None:
            raise ValueError("a UViT keeps no cache, as all of its rows change in every step; use it in MaskGIT")
        seen = rows.sight(masked=self.attention_dropout > 0 and self.has_rng("dropout"))
        x, earlier = self.down((x + rows.of(self.positions)).astype(self.dtype), None, seen, 0)
        x, _ = self.middle(x, None, seen, 0)
        x, _ = self.up(x, earlier[::-1], seen, 0)
        return self.norm(x), None

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        outputs, inputs = self.divided
        where = r"/(down|middle|up)/"
        return (
            (where + r"(qkv|fc1)/kernel$", outputs),
            (where + r"fc1/bias$", P("tp")),
            (where + r"(out|fc2)/kernel$", inputs),
        )
