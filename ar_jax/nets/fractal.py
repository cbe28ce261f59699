"""FractalGen (arXiv:2502.17437): conditions of its generators, the network of its causal ones, and that of its pixels."""

from typing import Annotated

import flax.linen as nn
import jax.numpy as jnp

from ar_jax.data import Info
from ar_jax.nets.attention import Rows
from ar_jax.nets.conditioning import Cond, Label
from ar_jax.nets.linear import Linear
from ar_jax.nets.mlp import xavier
from ar_jax.nets.queries import norm
from ar_jax.nets.transformer import Cache, Transformer, init
from ar_jax.nets.vit import Plain
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Batch, Bool, Float, Within, typed


class Repeated(nn.Module):
    """A label's vector, projected; one row or several alike.

    Attributes:
      label: looks the vector up.
      rows: how many.
    """

    label: Label
    rows: Annotated[int, Within(1, 64)] = 1

    @property
    def width(self) -> int:
        return self.label.width

    def complete(self, info: Info) -> "Repeated":
        return self.clone(label=self.label.complete(info))

    def example(self) -> Batch:
        return self.label.example()

    @nn.compact
    @typed
    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Cond:
        row = Linear(self.width, kernel_init=xavier, bias=True, name="projection")(self.label(batch, drop).rows)
        return Cond(jnp.broadcast_to(row, (len(row), self.rows, self.width)))


class FromAbove(nn.Module):
    """What a place of the generator above hands on, projected, the last vector first; before it the patch's mean colour.

    Attributes:
      width: of the network.
      vectors: of those handed on so many are read.
      colour: whether there is a mean colour; `Inside` knows.
    """

    width: int
    vectors: Annotated[int, Within(1, 5)] = 1
    colour: bool = False

    @property
    def rows(self) -> int:
        return self.vectors + self.colour

    def complete(self, info: Info) -> "FromAbove":
        raise ValueError("FromAbove is the conditioning of a generator inside another (Inside); that of the first is Repeated")

    def example(self) -> Batch:
        return {"handed": jnp.zeros((1, self.vectors, self.width)), "colour": jnp.zeros((1, 3))}

    @nn.compact
    @typed
    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Cond:
        """Of batch["handed"] [b r d] and batch["colour"] [b c]; `drop` was seen to above."""

        def projected(x, name):
            return Linear(self.width, kernel_init=xavier, bias=True, name=name)(x)

        handed = batch["handed"]
        if handed.shape[1] < self.vectors:
            raise ValueError(
                f"conditioning.vectors is {self.vectors}, but the generator above hands on {handed.shape[1]}; Causal hands on 1, "
                "Infilling 5"
            )
        rows = projected(handed[:, : self.vectors], "projection")[:, ::-1]
        if self.colour:
            rows = jnp.concatenate([projected(batch["colour"], "colour_projection")[:, None], rows], axis=1)
        return Cond(rows)


class Entered(Transformer):
    """As `Transformer`, but learned positions of the sequence are added to the rows, and layer norms come before the layers and
    after them.

    Attributes:
      rows: of the longest sequence; 0 is one for the condition and one for each token (`complete`).
      others: see `Transformer`.
    """

    final: bool = False
    rows: Annotated[int, Within(0, 2**24)] = 0

    def complete(self, spec: TokenSpec) -> "Entered":
        return self if self.rows else self.clone(rows=spec.n + 1)

    def setup(self):
        super().setup()
        self.before, self.norm = (norm(1e-6, self.dtype) for _ in range(2))
        self.positions = self.param("positions", init, (self.rows, self.width))

    @typed
    def __call__(
        self, x: Float[Array, "B q d"], rows: Rows, *, mod: None = None, cache: Cache | None = None
    ) -> tuple[Float[Array, "B q d"], Cache | None]:
        """Runs some rows of a sequence; see `Transformer`."""
        x, cache = super().__call__(self.before(x + rows.of(self.positions)), rows, cache=cache)
        return self.norm(x), cache


class Enclosed(Plain):
    """Rows see those of no later step; norms come before the layers and after them, and there are no positions.

    Attributes: see `Plain`.
    """

    def setup(self):
        self.before, self.norm = (norm(self.eps, self.dtype) for _ in range(2))
        self.blocks = self.blocks_with(bias=True)

    @typed
    def __call__(
        self, x: Float[Array, "B q d"], rows: Rows, *, mod: None = None, cache: Cache | None = None
    ) -> tuple[Float[Array, "B q d"], Cache | None]:
        """Runs some rows of a sequence; see `Transformer`."""
        x, cache = self.look(self.blocks, self.before(x), rows, cache)
        return self.norm(x), cache
