"""A head for tokens of several codes, which draws one after the other by a small transformer over the codes of one place."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from ar_jax.heads.categorical import Categorical
from ar_jax.machine.sharding import Rules
from ar_jax.nets.attention import Rows
from ar_jax.nets.conditioning import widen
from ar_jax.nets.linear import look_up
from ar_jax.nets.positions import NOWHERE
from ar_jax.nets.transformer import Transformer, init
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Float, Index, Int, Key, PRNGKey, Tokens, typed


class Far(nn.Module):
    """Draws sub-code after sub-code; each is predicted from the place's hidden row and the place's sub-codes before it.

    A place is a short sequence for `net`: the hidden row, then vectors of all sub-codes but the last. They lie where the
    first rows of an image lie: the hidden row nowhere, as a condition, those after it in the first cells of row 0. The
    generator's inputs look codes up in the same tables (`embed`), and its backbone has no norm of its own (`final=False`).

    Attributes:
      net: the small transformer, as wide as the generator's; its last norm is the only one before the logits.
      readout: of which each sub-code has one.
      pull: how much of the guidance beyond 1 each sub-code gets; () is all of it. A step's weight w makes that of sub-code
        k to 1 + pull[k] (w - 1).
      codes: sizes of the sub-codes; () until the tokenizer is known (`complete`).
    Source: FQGAN (arXiv:2411.16681), its factorised autoregressive head (FAR).
    """

    net: Transformer
    readout: Categorical = Categorical()
    pull: tuple[float, ...] = ()
    codes: tuple[int, ...] = ()

    adjustable = ("pull",)

    def complete(self, spec: TokenSpec) -> "Far":
        if len(spec.codes) < 2:
            raise ValueError(
                f"Far needs tokens of several discrete codes, but the tokenizer gives codes {spec.codes}; "
                "use Categorical for one code"
            )
        if self.pull and len(self.pull) != len(spec.codes):
            raise ValueError(
                f"head.pull is {self.pull}, but tokens have {len(spec.codes)} codes; give one number for each, or none"
            )
        return self.clone(codes=spec.codes)

    def by_layer(self) -> "Far":
        """The same head laid out for decoding."""
        return self.clone(net=self.net.by_layer(), readout=self.readout.by_layer())

    @nn.nowrap
    def slices(self, path: tuple[str, ...], leaf: Array) -> dict[tuple[str, ...], Array]:
        """What becomes of a parameter in that layout."""
        head, *inside = path
        part = self.net if inside[0] == "net" else self.readout
        if inside[0].startswith("tables"):
            return {path: leaf}
        return {(head, *where): x for where, x in part.slices(tuple(inside), leaf).items()}

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        return self.readout.rules + self.net.rules

    def setup(self):
        self.tables = [nn.Embed(codes, self.net.width, embedding_init=init) for codes in self.codes]
        self.readouts = [self.readout.clone(codes=codes) for codes in self.codes]

    @typed
    def embed(self, tokens: Tokens) -> Float[Array, "b m d"]:
        """Vectors of all sub-codes, side by side."""
        return jnp.concatenate(
            [look_up(table.embedding, tokens[..., k]) for k, table in enumerate(self.tables)], axis=-1
        )

    @typed
    def __call__(self, h: Float[Array, "B m d"], tokens: Int[Array, "B m k"]) -> tuple[Float[Array, "B m _"], ...]:
        """Logits of every sub-code, float32, with those before it given."""
        return tuple(readout(x) for readout, x in zip(self.readouts, self._forced(h, tokens)))

    @typed
    def loss(
        self, h: Float[Array, "b m d"], target: Int[Array, "b m k"], *, key: PRNGKey | None = None
    ) -> Float[Array, "b m"]:
        """Mean over sub-codes of the cross entropy in nats; `key` is unused."""
        rows = self._forced(h, target)
        each = [one.loss(x, target[..., k : k + 1]) for k, (one, x) in enumerate(zip(self.readouts, rows))]
        return sum(each) / len(each)

    def sample(
        self, h: Float[Array, "B m d"], keys: Key[Array, "b m"], knobs, i: Index, tokenizer: Callable | None = None
    ) -> Int[Array, "b m k"]:
        """Draws the codes per row of step `i`; guided rows (B = b * ways) are folded for every sub-code.

        Raises:
          ValueError: mixtures of codes are asked for.
        """
        if knobs.soften is not None:
            raise ValueError(
                "sampling.soften mixes all codes of one codebook, but Far draws several codes; leave it out"
            )
        return self.decide(h, keys, knobs, i)[0]

    def decide(
        self, h: Float[Array, "B m d"], keys: Key[Array, "b m"], knobs, i: Index
    ) -> tuple[Int[Array, "b m k"], Float[Array, "b m"]]:
        """Draws the codes per row of step `i`, and their log-probability among those that the filter leaves."""
        ways = len(h) // len(keys)
        rows = h.reshape(-1, 1, h.shape[-1])
        cache, steps = self.net.empty_cache(len(rows)), jnp.arange(len(self.codes))
        drawn, sure = [], jnp.zeros(keys.shape)
        for k, readout in enumerate(self.readouts):
            cache = cache.grow(k + 1)
            x, cache = self.net(rows, Rows(steps[k : k + 1], _coords(k, 1), k, steps[: k + 1]), cache=cache)
            pulled = knobs.replace(guidance=self._guidance(knobs, k))
            each = jax.vmap(jax.vmap(lambda key, k=k: jax.random.fold_in(key, k)))(keys)
            token, log = readout.decide(x.reshape(h.shape), each, pulled, i)
            drawn.append(token)
            sure += log
            rows = widen(look_up(self.tables[k].embedding, token[..., 0]), ways).reshape(-1, 1, h.shape[-1])
        return jnp.concatenate(drawn, axis=-1), sure

    def _guidance(self, knobs, k):
        weight = jnp.asarray(knobs.guidance)
        return 1 + self.pull[k] * (weight - 1) if self.pull else weight

    def _forced(self, h, tokens):
        """Rows [B m d] for the readout of every sub-code."""
        if h.shape[-1] != self.net.width:
            raise ValueError(
                f"head.net.width is {self.net.width}; it must be {h.shape[-1]}, that of the generator's network"
            )
        before = self.embed(tokens).reshape(*tokens.shape, -1)[:, :, :-1].astype(h.dtype)
        x = jnp.concatenate([h[:, :, None], before], axis=2)
        # steps that are not known while tracing: kernels for long sequences would pad these to a hundred rows
        x, _ = self.net(x.reshape(-1, *x.shape[2:]), Rows(jnp.arange(x.shape[2]), _coords(0, x.shape[2])))
        return jnp.moveaxis(x.reshape(*h.shape[:2], -1, h.shape[-1]), 2, 0)


def _coords(first, size):
    """Where rows first..first+size of a place's sequence lie, int32 [1 size 3]: nowhere, then in the cells of row 0."""
    cells = jnp.arange(first, first + size) - 1
    return jnp.stack([jnp.where(cells < 0, NOWHERE, 0), jnp.where(cells < 0, NOWHERE, 0), cells], axis=-1)[None]
