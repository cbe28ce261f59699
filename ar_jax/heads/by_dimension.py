"""The network of TokenBridge's head: rows are the sub-codes of a token, which each number of a continuous token gave one of."""

import jax.numpy as jnp

from ar_jax.generators.rar import Placed
from ar_jax.nets.attention import Rows
from ar_jax.nets.mlp import norm
from ar_jax.nets.transformer import Cache, init
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Float, typed


class Dimensions(Placed):
    """A `Placed` transformer of the rows of one token (`heads.factorised`), with positions and one norm more before the last.

    The first row gets the vector of its place too, which modulates it.

    Attributes:
      rows: 0 is one for each sub-code.
      plain_start: not in training: so the published weights were trained.
      others: see `Placed`.
    Source: TokenBridge (arXiv:2503.16430).
    """

    plain_start: bool = False

    def complete(self, spec: TokenSpec) -> "Dimensions":
        return self if self.rows else self.clone(rows=len(spec.codes))

    def setup(self):
        super().setup()
        self.position = self.param("position", init, (self.rows, self.width))
        self.norm = norm(None, self.dtype)

    @typed
    def __call__(
        self, x: Float[Array, "B q d"], rows: Rows, *, mod: Float[Array, "B d"], cache: Cache | None = None
    ) -> tuple[Float[Array, "B q d"], Cache | None]:
        """Runs some rows of a token; with a cache, as in drawing, earlier ones are read from it. See `Transformer`."""
        added = rows.of(self.position)
        if not (self.plain_start and cache is None):
            begins = (rows.first + jnp.arange(x.shape[1]) == 0)[:, None]
            added += jnp.where(begins, self.place[0], 0)
        return super().__call__(x + added, rows, mod=mod, cache=cache)

    def before_last(self, x):
        return self.norm(x)
