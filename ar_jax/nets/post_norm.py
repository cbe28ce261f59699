"""Transformers whose norms come after what they add to, with learned positions, as fairseq's decoders have them."""

from typing import Annotated

import flax.linen as nn

from ar_jax.machine.sharding import BATCH, constrain
from ar_jax.nets import vit
from ar_jax.nets.attention import Rows
from ar_jax.nets.transformer import Cache
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Float, Within, typed


class Block(vit.Block):
    """Attention and a two-layer perceptron, each followed by a norm of the sum."""

    def __call__(self, x, cache, seen, first):
        det = not self.has_rng("dropout")
        x = constrain(x, BATCH)
        y, cache = self.attend(x, cache, seen, first, det)
        x = self.attention_norm(x + self.drop(y, deterministic=det))
        return self.mlp_norm(x + self.drop(self.perceptron(x, det), deterministic=det)), cache


class PostNorm(vit.Plain):
    """Rows see those of no later step. They come multiplied with the root of the width, then learned positions are added.

    Attributes:
      rows: of the longest sequence; 0 is one for the condition and one for each token but the last (`complete`).
      others: see `Plain`.
    Source: DiGIT (arXiv:2410.12490), the decoder of fairseq.
    """

    rows: Annotated[int, Within(0, 2**24)] = 0
    eps: float = 1e-5

    kind = Block

    def complete(self, spec: TokenSpec) -> "PostNorm":
        return self if self.rows else self.clone(rows=spec.n)

    def setup(self):
        self.blocks = self.blocks_with(bias=True)
        self.positions = self.param("positions", nn.initializers.normal(self.width**-0.5), (self.rows, self.width))

    @typed
    def __call__(
        self, x: Float[Array, "B q d"], rows: Rows, *, mod: Array | None = None, cache: Cache | None = None
    ) -> tuple[Float[Array, "B q d"], Cache | None]:
        """Runs some rows of a sequence; see `Transformer`."""
        return self.look(self.blocks, x * self.width**0.5 + rows.of(self.positions), rows, cache)
