"""The head of factorised tokens: a small causal transformer draws the sub-codes of a token one after the other."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.heads.categorical import draw
from ar_jax.machine.sharding import Rules
from ar_jax.nets.attention import Rows
from ar_jax.nets.conditioning import fold, widen
from ar_jax.nets.linear import Linear, output_major
from ar_jax.nets.positions import NOWHERE
from ar_jax.nets.transformer import Transformer, slices
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Float, Index, Int, Key, Layers, PRNGKey, Share, Tokens, Unstored, typed


class Factorised(nn.Module):
    """Sub-code after sub-code, each given those before it.

    The rows of a token are its hidden row, which predicts the first sub-code, and the embeddings of all sub-codes but the
    last. These are the ones that make the generator's input rows: the head reads them of `inputs` of the module that it is
    part of (`Causal` with `Previous`). The first row lies nowhere, the others in a line (see `rotary`).

    Guidance and temperature are those of the step for all sub-codes, or one for each (`decode.guidance.BySubCode`).

    Attributes:
      layers, width, heads, hidden, dropout, base, eps: of the network (see `Transformer`); the width is that of hidden rows.
      codes: sizes of the sub-codes; () until the tokenizer is known (`complete`).
      dtype: of the matrix products; logits are float32.
      unroll: layout for decoding (see `Backbone`).
    Source: Open-MAGVIT2 (arXiv:2409.04410).
    """

    layers: Layers
    width: int
    heads: int
    hidden: int = 0
    dropout: Share = 0.0
    base: float = 10000.0
    eps: float = 1e-5
    codes: tuple[int, ...] = ()
    dtype: Any = jnp.float32
    unroll: Unstored = False

    def complete(self, spec: TokenSpec) -> "Factorised":
        if not spec.codes:
            raise ValueError(
                "Factorised needs tokens of codes, but the tokenizer gives continuous ones; use another head"
            )
        return self.clone(codes=spec.codes)

    def setup(self):
        self.net = Transformer(
            self.layers, self.width, self.heads, self.dtype, unroll=self.unroll, hidden=self.hidden, dropout=self.dropout,
            base=self.base, eps=self.eps,
        )  # fmt: skip
        self.readouts = [
            Linear(size, self.dtype, jnp.float32, nn.initializers.zeros, self.unroll, name=f"readout_{i}")
            for i, size in enumerate(self.codes)
        ]

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        net = Transformer(1, 4, 1, unroll=self.unroll)
        return *net.rules, (r"/readout_\d+/kernel$", net.divided[0])

    def by_layer(self) -> "Factorised":
        """The module of `Generator.unrolled`."""
        return self.clone(unroll=True)

    def slices(self, path: tuple[str, ...], leaf: Array) -> dict[tuple[str, ...], Array]:
        """What becomes of one parameter in `Generator.unrolled`; `path` begins with the head's name."""
        if path[1] == "net":
            return {(path[0], *inner): part for inner, part in slices(path[1:], leaf).items()}
        return {path: output_major(path[-1], leaf)}

    @nn.nowrap
    def calls(self, steps: int) -> np.ndarray:
        """Calls of the network in every decode step, int [steps]."""
        return np.full(steps, len(self.codes))

    @typed
    def __call__(self, h: Float[Array, "B m d"], tokens: Int[Array, "B m k"]) -> list[Float[Array, "B m v"]]:
        """Logits of every sub-code, float32, given the sub-codes of `tokens` before it."""
        before = [self._embedded(i, tokens[..., i], h) for i in range(len(self.codes) - 1)]
        rows = jnp.stack([self._checked(h), *before], axis=2)
        b, m, k, d = rows.shape
        # steps that are not known while tracing: kernels for long sequences would pad these few rows to a hundred
        y, _ = self.net(rows.reshape(b * m, k, d), Rows(jnp.arange(k), _places(0, k)))
        y = y.reshape(b, m, k, d)
        return [readout(y[:, :, i]) for i, readout in enumerate(self.readouts)]

    @typed
    def loss(
        self, h: Float[Array, "b m d"], target: Int[Array, "b m k"], *, key: PRNGKey | None = None
    ) -> Float[Array, "b m"]:
        """Sum of the sub-codes' cross entropies in nats; `key` is unused."""
        total = jnp.zeros(h.shape[:2])
        for i, logits in enumerate(self(h, target)):
            # not a gather: the vocabulary may be divided over devices
            chosen = jnp.where(jnp.arange(self.codes[i]) == target[..., i, None], logits, 0).sum(-1)
            total += jax.nn.logsumexp(logits, axis=-1) - chosen
        return total

    def sample(
        self, h: Float[Array, "B m d"], keys: Key[Array, "b m"], knobs, i: Index, tokenizer: Callable | None = None
    ) -> Tokens:
        """Draws a token per row of step `i`; guided rows (B = b * ways) are folded sub-code by sub-code."""
        return self.decide(h, keys, knobs, i)[0]

    def decide(
        self, h: Float[Array, "B m d"], keys: Key[Array, "b m"], knobs, i: Index
    ) -> tuple[Int[Array, "b m k"], Float[Array, "b m"]]:
        """Draws a token per row of step `i`, and its log-probability among those that the filter leaves."""
        if knobs.soften is not None:
            raise ValueError("sampling.soft mixes the codes of one codebook, but these tokens have several; give False")
        k, ways = len(self.codes), len(h) // len(keys)
        guidance, temperature = (_each(x, i, k) for x in (knobs.guidance, knobs.temperature))
        cache = self.net.empty_cache(h.shape[0] * h.shape[1]).grow(k)
        row, drawn, sure = self._checked(h), [], jnp.zeros(keys.shape)
        for j, readout in enumerate(self.readouts):
            rows = Rows(np.array([j]), _places(j, 1), j, np.arange(k))
            y, cache = self.net(row.reshape(-1, 1, row.shape[-1]), rows, cache=cache)
            logits = fold(readout(y.reshape(row.shape)), ways, guidance[j])
            logits = knobs.filter(logits / jnp.where(temperature[j] > 0, temperature[j], 1))
            own = jax.vmap(jax.vmap(lambda key, j=j: jax.random.fold_in(key, j)))(keys)
            drawn.append(draw(logits, own, temperature[j]))
            sure += jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[-1][..., None], axis=-1)[..., 0]
            if j + 1 < k:
                row = widen(self._embedded(j, drawn[-1], h), ways)
        return jnp.stack(drawn, axis=-1), sure

    def _checked(self, h):
        if h.shape[-1] != self.width:
            raise ValueError(f"head.width is {self.width}; it must be {h.shape[-1]}, that of the network")
        return h

    def _embedded(self, i, index, like):
        inputs = getattr(self.parent, "inputs", None)
        if not hasattr(inputs, "embed_code"):
            raise ValueError(
                f"Factorised reads the embeddings of sub-codes of the generator's inputs, which {type(self.parent).__name__} "
                f"has not; use Causal with Previous"
            )
        return inputs.embed_code(i, index).astype(like.dtype)


def _places(first: int, size: int) -> Int[np.ndarray, "1 k 3"]:
    """Coordinates of a token's rows: of the first nowhere, of the others 0, 1, ... in a line."""
    row = np.arange(first, first + size, dtype=np.int32)
    zero = np.zeros_like(row)
    return np.where(row[:, None] == 0, NOWHERE, np.stack([zero, zero, row - 1], axis=-1))[None]


def _each(x: Array, i: Index, k: int) -> Array:
    return jnp.broadcast_to(jnp.asarray(x)[i], (k,))
