"""Coarse-to-fine token prediction: the cluster of every code one after the other, then all codes at once.

`CoarseToFine(Transformer(...), Label(...), fine=Transformer(...), clusters=512)` over `tokenizers.clustered.Clustered`, in the order
`CoarseFirst()`. Of the paper (arXiv:2503.16194) the abstract alone was at hand: labels of clusters of the codebook are predicted
autoregressively, and an auxiliary network tells all codes from them in one pass. The rest is a reading.
"""

import dataclasses
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.data import Info
from ar_jax.generators.base import Frozen, Setting, State, Step
from ar_jax.generators.causal import Causal, valid_rows
from ar_jax.heads.categorical import Categorical
from ar_jax.machine import shares
from ar_jax.nets import transformer
from ar_jax.nets.attention import Rows
from ar_jax.nets.conditioning import Cond, widen
from ar_jax.nets.linear import look_up
from ar_jax.nets.positions import NOWHERE
from ar_jax.nets.transformer import Transformer
from ar_jax.orders import Order, raster
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Batch, Bool, Float, Index, Int, Key, Metrics, PRNGKey, Share, Within, typed


@dataclasses.dataclass(frozen=True)
class CoarseFirst:
    """Slots in the tokenizer's own order: the first half one by one, then the other half in one step."""

    def __call__(
        self, spec: TokenSpec, keys: Key[Array, "b"] | None = None, images: int = 1, train_step: Index = 0
    ) -> Order:
        half = spec.n // 2
        return Order(slot=np.arange(spec.n, dtype=np.int32)[None], sizes=(1,) * half + (spec.n - half,))


class CoarseToFine(Causal):
    """Prediction of clusters one by one, and then of the code that each is, of all at once.

    The first half of the tokens are clusters, which `backbone`, `inputs` and `head` predict as LlamaGen does codes; the others are
    the codes at the same places. A code is drawn from those of its cluster only.

    Attributes:
      fine: the network that tells codes from clusters; all rows see all, the condition's too.
      fine_head: of the codes.
      clusters: how many, as the tokenizer has.
      wrong: share of the clusters that `fine` is told wrong in training, any one in place of each.
      others: see `Causal`.
    Source: coarse-to-fine token prediction (arXiv:2503.16194); what its abstract leaves open is a reading: `wrong`, the size of
      `fine`, and that both networks are trained together.
    """

    backbone: Transformer
    fine: Transformer | None = None
    fine_head: Categorical = Categorical()
    clusters: Annotated[int, Within(1, 2**24)] = 512
    wrong: Share = 0.05

    parses = False

    def complete(self, spec: TokenSpec, info: Info) -> "CoarseToFine":
        if not isinstance(self.fine, Transformer) or self.fine.width != self.backbone.width:
            raise ValueError(f"generator.fine must be a Transformer of width {self.backbone.width}, got {self.fine}")
        return super().complete(spec, info)

    def on(self, spec: TokenSpec) -> "CoarseToFine":
        half = spec.n // 2
        coarse, fine = spec.coords[:half], spec.coords[half:]
        if spec.n < 4 or spec.n % 2 or len(spec.codes) != 1 or (coarse[:, 1:] != fine[:, 1:]).any():
            raise ValueError(
                f"CoarseToFine draws clusters of codes and then the codes, but the tokenizer's {spec.n} tokens of codes {spec.codes} "
                "are no such two halves; use tokenizers.clustered.Clustered"
            )
        if self.clusters > spec.codes[0]:
            raise ValueError(f"generator.clusters is {self.clusters}, but there are only {spec.codes[0]} codes")
        made, coarse = super().on(spec), dataclasses.replace(spec, coords=coarse, codes=(self.clusters,))
        return made.clone(head=made.head.complete(coarse), inputs=made.inputs.complete(coarse))

    def example(self) -> tuple[Order, Frozen]:
        everyone = jnp.ones((self.clusters, self.spec.codes[0]), bool)
        return CoarseFirst()(self.spec), lambda *arguments, method: everyone

    def setup(self):
        super().setup()
        self.told = self.param("told", transformer.init, (self.clusters, self.fine.width))

    @typed
    def loss(
        self,
        tokens: Int[Array, "b s 1"],
        batch: Batch,
        order: Order,
        *,
        drop: Bool[Array, "b"],
        key: PRNGKey | None = None,
        tokenizer: Frozen,
    ) -> tuple[Float[Array, "b s"], Float[Array, "b s"], Metrics]:
        """Teacher forcing of the clusters, and the codes by clusters of which some are wrong; without a key none is."""
        self.check(order)
        coarse, fine = jnp.split(tokens, 2, axis=1)
        cond = self.condition(batch, drop)
        first = self.head.loss(self.hidden(coarse, cond, raster(self.inputs.spec), tokenizer), coarse)
        told = coarse[..., 0]
        if key is not None and self.wrong:
            chance, other = jax.random.split(key)
            any_one = shares.draw(lambda k, shape: jax.random.randint(k, shape, 0, self.clusters), other, told.shape)
            told = jnp.where(shares.draw(jax.random.uniform, chance, told.shape) < self.wrong, any_one, told)
        logits = jnp.where(self.members(tokenizer, coarse), self.fine_head(self.known(told, cond)), -jnp.inf)
        # not a gather: the vocabulary may be divided over devices
        chosen = jnp.where(jnp.arange(logits.shape[-1]) == fine, logits, 0).sum(-1)
        loss = jnp.concatenate([first, jax.nn.logsumexp(logits, axis=-1) - chosen], axis=1)
        weight = self.weight(batch, order, len(tokens))
        parts = {"perplexity": slice(None, first.shape[1]), "fine_perplexity": slice(first.shape[1], None)}
        mean = lambda part: (loss * weight)[:, part].sum() / jnp.maximum(weight[:, part].sum(), 1e-9)  # noqa: E731
        return loss, weight, {name: jnp.exp(mean(part)) for name, part in parts.items()}

    @nn.nowrap
    def check(self, order: Order) -> None:
        """Raises a ValueError if the order is another one, as far as that is known while tracing."""
        known = isinstance(order.slot, np.ndarray)  # else an argument of a compiled program
        want = CoarseFirst()(self.spec)
        if order.sizes != want.sizes or len(order.slot) > 1 or (known and (order.slot != want.slot).any()):
            raise ValueError(
                f"clusters are drawn one by one and then all codes at once, but order.sizes is {order.sizes[:8]}...; use CoarseFirst"
            )

    def members(self, tokenizer: Frozen, coarse: Int[Array, "b n 1"]) -> Bool[Array, "b n v"]:
        """Which codes lie in the clusters.

        Raises:
          ValueError: the tokenizer has another number of clusters.
        """
        table = tokenizer(method="members")
        if table.shape[0] != self.clusters:
            raise ValueError(f"generator.clusters is {self.clusters}, but the tokenizer has {table.shape[0]}")
        return table[coarse[..., 0]]

    @typed
    def known(self, coarse: Int[Array, "b n"], cond: Cond) -> Float[Array, "B n d"]:
        """Hidden row of every code, told by all clusters."""
        p, n = cond.rows.shape[1], coarse.shape[1]
        x = widen(look_up(self.told, coarse), len(cond.rows) // len(coarse))
        x = jnp.concatenate([cond.rows.astype(x.dtype), x], axis=1)
        coords = jnp.pad(jnp.asarray(self.inputs.spec.coords), ((p, 0), (0, 0)), constant_values=NOWHERE)[None]
        rows = Rows(np.zeros(p + n, np.int32), coords, valid=valid_rows(cond, p + n))
        return self.fine(x, rows)[0][:, p:]

    def begin(self, setting: Setting, images: int) -> State:
        self.check(setting.order)
        if setting.knobs.soften is not None:
            raise ValueError("soft draws mixtures of codes, which lie in no cluster; leave it out")
        return super().begin(self.by_cluster(setting), images)

    def grow(self, state: State, ranks: int, setting: Setting) -> State:
        return super().grow(state, min(ranks, self.spec.n // 2), setting)

    def step(self, state: State, now: Step, setting: Setting) -> State:
        """Reveals a cluster, or in the end all codes."""
        if now.size == 1:
            return super().step(state, now, self.by_cluster(setting))
        coarse = state.tokens[:, : self.spec.n // 2]
        members, own = self.members(setting.tokenizer, coarse), setting.knobs.filter
        knobs = setting.knobs.replace(filter=lambda x: own(jnp.where(members, x, -jnp.inf)))
        fine = self.fine_head.sample(self.known(coarse[..., 0], setting.cond), now.keys, knobs, now.i)
        return state.replace(tokens=jnp.concatenate([coarse, fine], axis=1))

    @nn.nowrap
    def by_cluster(self, setting: Setting) -> Setting:
        return setting.replace(order=raster(self.inputs.spec))

    @nn.nowrap
    def calls(self, order: Order) -> dict[str, np.ndarray]:
        """See `Generator`; "fine" is the network of the codes."""
        last = np.arange(len(order.sizes)) == len(order.sizes) - 1
        return {"generator": (~last).astype(int), "fine": last.astype(int)}
