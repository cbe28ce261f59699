"""The head of factorised tokens: a small causal network draws the sub-codes of a token one after the other."""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.heads.by_dimension import Dimensions
from ar_jax.heads.categorical import Categorical
from ar_jax.machine.sharding import BATCH, Rules, constrain
from ar_jax.nets.attention import Rows
from ar_jax.nets.conditioning import fold, widen
from ar_jax.nets.linear import Linear, look_up
from ar_jax.nets.mlp import xavier
from ar_jax.nets.positions import NOWHERE
from ar_jax.nets.transformer import Transformer
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Float, Index, Int, Key, PRNGKey, Tokens, typed


class Factorised(nn.Module):
    """Sub-code after sub-code, each given the hidden row and those before it.

    A token is a short sequence for `net`: the hidden row, then vectors of all sub-codes but the last, each out of a table of
    its own. They lie where the first rows of an image lie: the hidden row nowhere, as a condition, those after it in the
    first cells of row 0. A generator's inputs may look codes up in the same tables (`embed`, for `Previous(shared=True)`);
    only then has the last sub-code one too.

    Guidance and temperature are those of the step for all sub-codes, or one for each (`decode.guidance.BySubCode`).

    Attributes:
      net: the small network: `Transformer`, or `Dimensions`, which the first row modulates.
      readout: of which each sub-code has one.
      order: in which sub-codes are drawn; () takes them as they come.
      projected: the first row is a learned projection of the hidden row; else that itself, which is as wide as `net`.
      guided: what guidance acts on: "logits" of every sub-code, or "rows", the hidden rows.
      summed: the loss of a token is the sum of its sub-codes' cross entropies, not their mean.
      std: of the tables at the start.
      codes: sizes of the sub-codes; () until the tokenizer is known (`complete`).
    Source: Open-MAGVIT2 (arXiv:2409.04410), FQGAN (arXiv:2411.16681), TokenBridge (arXiv:2503.16430).
    """

    net: Transformer | Dimensions
    readout: Categorical = Categorical()
    order: tuple[int, ...] = ()
    projected: bool = False
    guided: Literal["logits", "rows"] = "logits"
    summed: bool = False
    std: float = 0.02
    codes: tuple[int, ...] = ()

    def complete(self, spec: TokenSpec) -> "Factorised":
        if not spec.codes:
            raise ValueError(
                "Factorised needs tokens of codes, but the tokenizer gives continuous ones; use another head"
            )
        if self.order and sorted(self.order) != list(range(len(spec.codes))):
            raise ValueError(
                f"head.order is {self.order}; it must have each of the tokenizer's {len(spec.codes)} sub-codes once, or be ()"
            )
        if self.guided not in ("logits", "rows"):
            raise ValueError(f"head.guided is {self.guided!r}; it must be logits or rows")
        return self.clone(net=self.net.complete(spec), codes=spec.codes)

    def setup(self):
        sizes, begin = [self.codes[i] for i in self.ordered], nn.initializers.normal(self.std)
        self.tables = [nn.Embed(size, self.net.width, embedding_init=begin) for size in sizes]
        self.readouts = [self.readout.clone(codes=size) for size in sizes]
        if self.projected:
            self.condition = Linear(self.net.width, self.net.dtype, None, xavier, bias=True)

    @property
    def ordered(self) -> np.ndarray:
        """Which sub-code is drawn when, int [k]."""
        return np.array(self.order or range(len(self.codes)))

    @property
    def dtype(self) -> Any:
        """Of all matrix products, None where they differ."""
        return self.net.dtype if self.net.dtype == self.readout.dtype else None

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        return self.readout.rules + self.net.rules

    def by_layer(self) -> "Factorised":
        """The same head laid out for decoding."""
        return self.clone(net=self.net.by_layer())

    @nn.nowrap
    def slices(self, path: tuple[str, ...], leaf: Array) -> dict[tuple[str, ...], Array]:
        """What becomes of a parameter in that layout; `path` begins with the head's name."""
        head, *inside = path
        if inside[0] != "net":
            return {path: leaf}
        return {(head, *where): x for where, x in self.net.slices(tuple(inside), leaf).items()}

    @nn.nowrap
    def calls(self, steps: int) -> np.ndarray:
        """Calls of the network in every decode step, int [steps]."""
        return np.full(steps, len(self.codes))

    @typed
    def embed(self, tokens: Tokens) -> Float[Array, "b m d"]:
        """Vectors of all sub-codes, side by side in the order they are drawn in."""
        return jnp.concatenate([self._vector(j, tokens[..., i]) for j, i in enumerate(self.ordered)], axis=-1)

    @typed
    def __call__(self, h: Float[Array, "B m d"], tokens: Int[Array, "B m k"]) -> list[Float[Array, "B m v"]]:
        """Logits of every sub-code, float32, in the order they are drawn in, given those before as `tokens` has them."""
        return [readout(x) for readout, x in zip(self.readouts, self._forced(h, tokens))]

    @typed
    def loss(
        self, h: Float[Array, "b m d"], target: Int[Array, "b m k"], *, key: PRNGKey | None = None
    ) -> Float[Array, "b m"]:
        """Cross entropy in nats, over all sub-codes; `key` is unused."""
        each = zip(self.readouts, self._forced(h, target), self.ordered)
        total = sum(readout.loss(x, target[..., i : i + 1]) for readout, x, i in each)
        return total if self.summed else total / len(self.codes)

    def sample(
        self, h: Float[Array, "B m d"], keys: Key[Array, "b m"], knobs, i: Index, tokenizer: Callable | None = None
    ) -> Tokens:
        """Draws a token per row of step `i`; guided rows (B = b * ways) are folded.

        Raises:
          ValueError: mixtures of codes are asked for, or guidance by sub-code that acts on rows.
        """
        if knobs.soften is not None:
            raise ValueError("sampling.soft mixes the codes of one codebook, but these tokens have several; give False")
        return self.decide(h, keys, knobs, i)[0]

    def decide(
        self, h: Float[Array, "B m d"], keys: Key[Array, "b m"], knobs, i: Index
    ) -> tuple[Int[Array, "b m k"], Float[Array, "b m"]]:
        """Draws a token per row of step `i`, and its log-probability among those that the filter leaves."""
        (images, m), k = keys.shape, len(self.codes)
        if self.guided == "rows":
            if knobs.guidance.ndim > 1:
                raise ValueError("guidance has a weight for each sub-code, but acts on hidden rows; give one weight")
            h = fold(h, len(h) // images, jnp.asarray(knobs.guidance)[i])
        x = self._first(h)
        ways, mod, cache = len(x) // images, self._modulation(x), self.net.empty_cache(len(x) * m).grow(k)
        drawn, sure = [], jnp.zeros(keys.shape)
        for j in range(k):
            rows = Rows(np.array([j]), _places(j, 1), j, np.arange(k))
            y, cache = self.net(x.reshape(len(x) * m, 1, -1), rows, mod=mod, cache=cache)
            of_j = knobs.replace(guidance=_of(knobs.guidance, j), temperature=_of(knobs.temperature, j))
            token, log = self.draw(j, y.reshape(x.shape), self.own(keys, j), of_j, i)
            drawn.append(token)
            sure += log
            if j + 1 < k:
                x = widen(self._vector(j, token[..., 0]), ways).astype(x.dtype)
        return jnp.concatenate(drawn, axis=-1)[..., np.argsort(self.ordered)], sure

    @nn.nowrap
    def own(self, keys: Key[Array, "b m"], j: int) -> Key[Array, "b m"]:
        """Keys of the sub-code that comes j-th."""
        return jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, j)))(keys)

    def draw(
        self, j: int, y: Float[Array, "B m w"], keys: Key[Array, "b m"], knobs, i: Index
    ) -> tuple[Int[Array, "b m 1"], Float[Array, "b m"]]:
        """The sub-code that comes j-th, of the network's rows and knobs of its own, and its log-probability."""
        return self.readouts[j].decide(y, keys, knobs, i)

    def _forced(self, h, tokens):
        """Rows for the readouts, k of [B m w]."""
        first = self._first(h)
        before = [self._vector(j, tokens[..., i]).astype(first.dtype) for j, i in enumerate(self.ordered[:-1])]
        x = jnp.stack([first, *before], axis=2)
        b, m, k, w = x.shape
        # steps that are not known while tracing: kernels for long sequences would pad these few rows to a hundred
        rows = Rows(jnp.arange(k), _places(0, k))
        y, _ = self.net(x.reshape(b * m, k, w), rows, mod=self._modulation(first))
        return jnp.moveaxis(y.reshape(x.shape), 2, 0)

    def _first(self, h):
        if self.projected:
            return constrain(self.condition(h), BATCH)
        if h.shape[-1] != self.net.width:
            raise ValueError(
                f"head.net.width is {self.net.width}; it must be {h.shape[-1]}, that of the generator's network"
            )
        return h

    def _modulation(self, first):
        return self.net.modulate(first.reshape(-1, first.shape[-1]))

    def _vector(self, j, index):
        return look_up(self.tables[j].embedding, index)


def _places(first: int, size: int) -> Int[np.ndarray, "1 k 3"]:
    """Coordinates of a token's rows: of the first nowhere, of the others 0, 1, ... in a line."""
    row = np.arange(first, first + size, dtype=np.int32)
    zero = np.zeros_like(row)
    return np.where(row[:, None] == 0, NOWHERE, np.stack([zero, zero, row - 1], axis=-1))[None]


def _of(x, j):
    """What the j-th sub-code has of guidance or temperature, float32 [steps]."""
    return x[:, j] if x.ndim > 1 else x
