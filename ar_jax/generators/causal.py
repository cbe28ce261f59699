"""Causal generators: each token is predicted from those of earlier steps, rows are fed once into a cache."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ar_jax.data import Info
from ar_jax.generators.base import Conditioning, Frozen, Generator, Head, Setting, State, Step, image_weight
from ar_jax.generators.inputs import NextScale, Previous, some
from ar_jax.heads.categorical import Categorical
from ar_jax.machine.sharding import BATCH, constrain
from ar_jax.nets.attention import Rows
from ar_jax.nets.conditioning import Cond
from ar_jax.nets.dropout import Dropout
from ar_jax.nets.gated import EncoderDecoder
from ar_jax.nets.positions import NOWHERE
from ar_jax.nets.transformer import Backbone, Cache
from ar_jax.orders import NEVER, Order, to_ranks
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Batch, Bool, Float, Index, Int, Metrics, PRNGKey, Share, Tokens, typed


class Causal(Generator):
    """Prediction of tokens step by step, one token or many at a time.

    Each rank has a row, which the network turns into a prediction of its token. What the row carries is up to `inputs`:
    the token before (LlamaGen), or what coarser scales say of the place (VAR).

    Attributes:
      backbone: the network (`Transformer`, `AdaLN`, `EncoderDecoder`).
      conditioning: makes condition rows from a batch (`Label`, `Caption`).
      head: turns hidden rows into a distribution over tokens (`Categorical`, `Factorised`, `Bitwise`; `Diffusion`, `Flow`,
        `GaussianMixture`).
      inputs: what rows carry (`Previous`, `Joined`, `NextScale`, `Upsampled`, `NextLatent`).
      dropout: rate on the input rows; active only when a "dropout" key is given to `apply`.
      emphasis: weight of a step's tokens in training: all tokens alike ("equal"), all levels alike, however many tokens they have
        ("levels"), or "lognorm" (see `lognorm`).
      spec: the tokens; None until the tokenizer is known (`complete`).
    Source: LlamaGen (arXiv:2406.06525), VAR (arXiv:2404.02905), FlexVAR (arXiv:2502.20313).
    """

    backbone: Backbone | EncoderDecoder
    conditioning: Conditioning
    head: Head = Categorical()
    inputs: Previous | NextScale = Previous()
    dropout: Share = 0.0
    emphasis: Literal["equal", "levels", "lognorm"] = "equal"
    spec: TokenSpec | None = None

    corrects = True
    parses = True

    def complete(self, spec: TokenSpec, info: Info) -> "Causal":
        if self.emphasis not in ("equal", "levels", "lognorm"):
            raise ValueError(f"generator.emphasis is {self.emphasis!r}; it must be equal, levels or lognorm")
        return super().complete(spec, info)

    def on(self, spec: TokenSpec) -> "Causal":
        return Generator.on(self.clone(inputs=self.inputs.clone(width=self.backbone.width)), spec)

    def by_layer(self) -> "Causal":
        return self.clone(**{name: part.by_layer() for name, part in self.parts().items() if hasattr(part, "by_layer")})

    def slices(self, path: tuple[str, ...], leaf: Array) -> dict[tuple[str, ...], Array]:
        part = self.parts().get(path[0])
        return part.slices(path, leaf) if hasattr(part, "slices") else {path: leaf}

    def example(self) -> tuple[Order, Frozen | None]:
        return self.inputs.example()

    def setup(self):
        self.drop = Dropout(self.dropout)

    @typed
    def loss(
        self,
        tokens: Int[Array, "b s k"] | Float[Array, "b s k"],
        batch: Batch,
        order: Order,
        *,
        drop: Bool[Array, "b"],
        key: PRNGKey | None = None,
        tokenizer: Frozen | None = None,
        given: Int[Array, "b s k"] | Float[Array, "b s k"] | None = None,
    ) -> tuple[Float[Array, "b n"], Float[Array, "b n"], Metrics]:
        """Teacher forcing.

        Args:
          tokens: in slot order.
          batch: the condition, and optionally "valid" [b], the weight of each image (default 1).
          order: what each step reveals.
          drop: images trained without their condition.
          key: for heads that draw noise.
          tokenizer: calls a method of the frozen tokenizer; `Previous` needs none.
          given: what rows are made of, where that has mistakes; None is `tokens`.

        Returns:
          The head's loss and weight of every rank, and metrics.
        """
        target = to_ranks(tokens, order)
        known = target if given is None else to_ranks(given, order)
        loss = self.head.loss(self.hidden(known, self.condition(batch, drop), order, tokenizer), target, key=key)
        weight = self.weight(batch, order, len(tokens))
        if self.spec.grammar:
            weight = weight * (target[..., 0] != self.spec.grammar.padding)
        if not self.spec.codes:
            return loss, weight, {}
        return loss, weight, {"perplexity": jnp.exp((loss * weight).sum() / jnp.maximum(weight.sum(), 1e-9))}

    def nats(
        self, tokens: Tokens, batch: Batch, order: Order, *, drop: Bool[Array, "b"], key: PRNGKey | None = None,
        tokenizer: Frozen | None = None,
    ) -> Float[Array, "b"]:  # fmt: skip
        """Minus the log-probability of every image's tokens, for heads that give that of a token; arguments as of `loss`."""
        target = to_ranks(tokens, order)
        h = self.hidden(target, self.condition(batch, drop), order, tokenizer)
        return self.head.nats(h, target, key=key).sum(1)

    @nn.nowrap
    def weight(self, batch: Batch, order: Order, images: int) -> Float[Array, "b n"]:
        """Weight of every rank in training."""
        by_slot = lognorm(self.spec) if self.emphasis == "lognorm" else np.ones(self.spec.n, np.float32)
        if self.emphasis == "levels":
            _, level, count = np.unique(self.spec.coords[:, 0], return_inverse=True, return_counts=True)
            by_slot = (self.spec.n / len(count) / count).astype(np.float32)[level]
        by_rank = jnp.asarray(by_slot)[order.slot] * jnp.asarray(order.step != NEVER, jnp.float32)
        return image_weight(batch, images)[:, None] * by_rank

    def hidden(
        self, tokens: Tokens, cond: Cond, order: Order, tokenizer: Frozen | None = None
    ) -> Float[Array, "b n d"]:
        """Hidden row of every rank, from tokens in rank order."""
        p = cond.rows.shape[1]
        x, coords = self.inputs(tokens, cond, order, self.tables(tokenizer), 0, order.n)
        x = constrain(jnp.concatenate([cond.rows[:, :-1].astype(x.dtype), x], axis=1), BATCH)
        coords = jnp.pad(coords, ((0, 0), (p - 1, 0), (0, 0)), constant_values=NOWHERE)
        x = self.drop(x, deterministic=not self.has_rng("dropout"))
        h, _ = self.network(x, Rows(self.row_steps(p, order), coords, valid=valid_rows(cond, p - 1 + order.n)), cond)
        return h[:, p - 1 :]

    def tables(self, tokenizer: Frozen | None) -> Frozen | None:
        """Whose `embed` the inputs may ask for what codes stand for: the head's, if they share its tables."""
        if not getattr(self.inputs, "shared", False):
            return tokenizer
        if not hasattr(self.head, "embed"):
            raise ValueError(
                f"inputs.shared is True, but {type(self.head).__name__} has no tables to look codes up in; use Factorised"
            )
        return lambda *arguments, method: getattr(self.head, method)(*arguments)

    def row_steps(self, p: int, order: Order) -> Array:
        """Steps of p-1 condition rows and of the rows of all ranks."""
        before, step = np.arange(1 - p, 0, dtype=np.int32), order.step
        return (np if isinstance(step, np.ndarray) else jnp).concatenate([before, step])

    def network(self, x: Array, rows: Rows, cond: Cond, cache: Cache | None = None) -> tuple[Array, Cache | None]:
        """Rows through the network, see `Transformer`."""
        return self.backbone(x, rows, mod=cond.mod, cache=cache)

    def begin(self, setting: Setting, images: int) -> State:
        """Feeds all condition rows but the last into an empty cache."""
        cond, order = setting.cond, setting.order
        self.inputs.check(order)
        rows, p, _ = cond.rows.shape
        cache = self.backbone.empty_cache(rows, setting.kept)
        if p > 1:
            step, nowhere = cond.step[:-1], jnp.full((1, p - 1, 3), NOWHERE)
            before = Rows(step, nowhere, keys=step, valid=valid_rows(cond, p - 1))
            _, cache = self.network(cond.rows[:, :-1], before, cond, cache.grow(p - 1))
        if self.spec.grammar:
            known = isinstance(order.slot, np.ndarray)  # else an argument of a compiled program
            if len(order.slot) > 1 or (known and (order.slot != np.arange(self.spec.n)).any()):
                raise ValueError("tokens that have a grammar are drawn in the order of their slots; use orders.raster")
            if setting.knobs.soften is not None:
                raise ValueError("soft draws mixtures of codes, of which no grammar speaks; leave it out")
            return State(self.spec.zeros(images), cache, jnp.zeros(images, jnp.int32))
        if setting.knobs.soften is None:
            return State(self.spec.zeros(images), cache)
        vector = jax.eval_shape(lambda: setting.tokenizer(self.spec.zeros(1), method="embed"))
        return State(jnp.zeros((images, order.n, vector.shape[-1])), cache)

    def grow(self, state: State, ranks: int, setting: Setting) -> State:
        rows = setting.cond.rows.shape[1] - 1 + ranks
        return state if state.cache is None else state.replace(cache=state.cache.grow(rows))

    def step(self, state: State, now: Step, setting: Setting) -> State:
        """Reveals the ranks of a step."""
        h, cache = self.rows(state, now.first, now.size, setting)
        knobs, parsed = setting.knobs, state.parsed
        if self.spec.grammar:
            last = some(state.tokens, jnp.maximum(now.first - 1, 0), 1)[:, 0, 0]
            parsed = jnp.where(now.first > 0, self.spec.grammar.follow(parsed, last), 0)
            legal = self.spec.grammar.legal(parsed, setting.order.n - now.first)[:, None]
            knobs = knobs.replace(filter=lambda x: setting.knobs.filter(jnp.where(legal, x, -jnp.inf)))
        token = self.head.sample(h, now.keys, knobs, now.i, setting.tokenizer)
        return State(_written(state.tokens, token, now.first), cache, parsed)

    def rows(
        self, state: State, first: Index, size: int, setting: Setting
    ) -> tuple[Float[Array, "B m d"], Cache | None]:
        """Hidden rows of ranks first..first+size, given a state in which all earlier steps are known and cached."""
        cond, order = setting.cond, setting.order
        p = cond.rows.shape[1]
        x, coords = self.inputs(state.tokens, cond, order, self.tables(setting.tokenizer), first, size)
        steps = self.row_steps(p, order)
        step = some(steps, p - 1 + first, size, 0)
        if state.cache is None:
            return self.network(x, Rows(step, coords), cond)
        filled = state.cache.rows
        rows = Rows(step, coords, p - 1 + first, steps[:filled], valid_rows(cond, filled))
        return self.network(x, rows, cond, state.cache)


def lognorm(spec: TokenSpec) -> np.ndarray:
    """Weight of every slot, float32 [n], with sum 1: scales of middling size count most, whatever their slots.

    Source: HMAR (arXiv:2506.04421).
    """
    sides = np.sqrt([height * width for height, width in spec.scales])
    place = sides / sides[-1]
    each = np.exp(-0.5 * np.square((place[::-1] - place.mean()) / place.std(ddof=1)))
    each /= each.sum()
    return np.repeat(each / np.square(sides), np.square(sides).round().astype(int)).astype(np.float32)


def _written(tokens: Tokens, new: Tokens, first: Index) -> Tokens:
    """Tokens with new ones from rank `first` on."""
    if new.shape[1] > 1:
        return lax.dynamic_update_slice_in_dim(tokens, new, first, axis=1)
    # of one image XLA makes that a copy by the host's hand, a second launch for every token on a GPU
    return jnp.where(jnp.arange(tokens.shape[1])[:, None] == first, new, tokens)


def valid_rows(cond: Cond, rows: int) -> Bool[Array, "B r"] | None:
    """Which of the first `rows` rows may be seen."""
    if cond.valid is None:
        return None
    p = cond.valid.shape[1]
    return jnp.pad(cond.valid[:, :rows], ((0, 0), (0, max(0, rows - p))), constant_values=True)
