"""VF prompt: tokens of the whole image before those of its parts, in a generator of codes one after the other.

`Prompted(Transformer(...), Label(...))` over `tokenizers.two_sizes.TwoSizes`, in raster order. Of the paper ("Autoregressive Image
Generation with Vision Full-view Prompt") the abstract alone was at hand: that such tokens come first and say what the whole is, in
training and in sampling, and that network and order stay as they are. What they are is not in it. All three prompts here are readings.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ar_jax.data import Info
from ar_jax.decode.logits import top_k
from ar_jax.generators.base import Frozen
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import Previous, some
from ar_jax.heads.categorical import Categorical
from ar_jax.machine import shares
from ar_jax.nets import transformer
from ar_jax.nets.conditioning import Cond, widen
from ar_jax.nets.linear import look_up
from ar_jax.orders import Order
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Batch, Bool, Float, Index, Int, Key, Many, Metrics, PRNGKey, Tokens, typed

Prompt = Literal["codes", "random", "learned"]


def prompts(spec: TokenSpec) -> int:
    """Slots of the prompt, which come first; 0 of tokens in one grid."""
    return int((spec.coords[:, 0] < spec.coords[:, 0].max()).sum())


def check_in_slots(order: Order) -> None:
    """Raises a ValueError if ranks are no slots, as far as that is known while tracing."""
    if len(order.slot) > 1 or (isinstance(order.slot, np.ndarray) and (order.slot != np.arange(order.n)).any()):
        raise ValueError("a prompt is drawn first, and all tokens in the order of their slots; use orders.raster")


class PromptRows(Previous):
    """As `Previous`, but a token of the prompt has a table of its own, and lies in the middle of its part of the image's grid.

    Attributes:
      prompt: see `Prompted`, which tells it.
      others: see `Previous`.
    """

    prompt: Prompt = "codes"

    def complete(self, spec: TokenSpec) -> "PromptRows":
        if len(spec.codes) != 1 or self.shared or len(spec.scales) > 2:
            raise ValueError(
                f"a prompt goes before one grid of one code a token, but the tokenizer has {spec.scales} of codes {spec.codes}"
                + " and inputs.shared is True" * self.shared
            )
        return super().complete(spec)

    def check(self, order: Order) -> None:
        super().check(order)
        check_in_slots(order)

    def setup(self):
        super().setup()
        if count := prompts(self.spec):
            rows = count if self.prompt == "learned" else self.spec.codes[0]
            self.table = self.param("prompt", transformer.init, (rows, self.width))

    @typed
    def __call__(
        self, tokens: Tokens, cond: Cond, order: Order, tokenizer: Frozen | None, first: Index, size: int
    ) -> tuple[Float[Array, "B m d"], Int[Array, "#B m 3"] | Float[Array, "#B m 3"]]:
        """As `Previous`."""
        x, coords = super().__call__(tokens, cond, order, tokenizer, first, size)
        if not (count := prompts(self.spec)):
            return x, coords
        slot = first - 1 + jnp.arange(size)  # of the token that a row carries
        here = ((slot >= 0) & (slot < count))[:, None]
        if self.prompt == "learned":
            rows = look_up(self.table, jnp.clip(slot, 0, count - 1))[None]
        else:
            codes = some(jnp.pad(tokens[:, :-1, 0], ((0, 0), (1, 0))), first, size)
            rows = widen(look_up(self.table, codes), len(x) // len(tokens))
        few, many = np.array(self.spec.scales, np.float32)
        middle = (coords[..., 1:] + 0.5) * (many / few) - 0.5
        middle = jnp.concatenate([coords[..., :1].astype(jnp.float32), middle], axis=-1)
        return jnp.where(here, rows.astype(x.dtype), x), jnp.where(here, middle, coords)


class PromptCodes(Categorical):
    """As `Categorical`, but a prompt is drawn from fewer codes, or not from what is predicted.

    It takes the rows of step i to be those of slots i, i + 1 and so on, as they are where slots are drawn one by one in order.

    Attributes:
      prompt_top_k: so many of the most likely codes the prompt is drawn from, of those that the filter leaves; 0 takes all.
      prompt: see `Prompted`, which tells it.
      prompts: slots of the prompt; told by the tokenizer (`complete`).
      others: see `Categorical`.
    """

    prompt_top_k: Many = 0
    prompt: Prompt = "codes"
    prompts: Many = 0

    adjustable = ("prompt_top_k",)

    def complete(self, spec: TokenSpec) -> "PromptCodes":
        return super().complete(spec).clone(prompts=prompts(spec))

    def filtered(self, h: Float[Array, "B m d"], images: int, knobs, i: Index) -> Float[Array, "b m v"]:
        """See `Categorical`."""
        logits = super().filtered(h, images, knobs, i)
        if self.prompt != "codes" or not self.prompts or not self.prompt_top_k:
            return logits
        here = self.here(i, logits.shape[1])
        return lax.cond(here.any(), lambda x: jnp.where(here, top_k(x, self.prompt_top_k), x), lambda x: x, logits)

    def draw(self, logits: Float[Array, "b m v"], keys: Key[Array, "b m"], knobs, i: Index) -> Int[Array, "b m 1"]:
        """See `Categorical`; a random prompt is so at any temperature."""
        drawn = super().draw(logits, keys, knobs, i)
        if self.prompt == "codes" or not self.prompts:
            return drawn
        other = jnp.zeros_like(drawn)
        if self.prompt == "random":
            other = jax.vmap(jax.vmap(lambda key: jax.random.randint(key, (1,), 0, self.codes)))(keys)
        return jnp.where(self.here(i, logits.shape[1]), other, drawn)

    def here(self, i: Index, size: int) -> Bool[Array, "m 1"]:
        """Which rows of step i are of the prompt."""
        return (i + jnp.arange(size) < self.prompts)[:, None]


class Prompted(Causal):
    """Prediction of codes one by one, those of a prompt first, which the others are drawn after.

    Attributes:
      prompt: what the tokens of the prompt are. "codes" are those of the image made small, learned and drawn as all others are;
        "random" are random codes, and "learned" the same vectors for all images: nothing is said with them, there are only more
        rows to compute in, and nobody has to predict them.
      others: see `Causal`. Tokens without a prompt (`TwoSizes` with 0, or its base) make it `Causal` itself.
    Source: readings of "Autoregressive Image Generation with Vision Full-view Prompt"; which of them the paper's is, its abstract
      does not say.
    """

    head: PromptCodes = PromptCodes()
    inputs: PromptRows = PromptRows()
    prompt: Prompt = "codes"

    corrects = False

    def complete(self, spec: TokenSpec, info: Info) -> "Prompted":
        if self.prompt not in ("codes", "random", "learned"):
            raise ValueError(f"generator.prompt is {self.prompt!r}; it must be codes, random or learned")
        return super().complete(spec, info)

    def on(self, spec: TokenSpec) -> "Prompted":
        parts = {name: getattr(self, name).clone(prompt=self.prompt) for name in ("head", "inputs")}
        return Causal.on(self.clone(**parts), spec)

    def loss(
        self, tokens: Int[Array, "b n 1"], batch: Batch, order: Order, *, drop: Bool[Array, "b"], key: PRNGKey | None = None,
        tokenizer: Frozen | None = None,
    ) -> tuple[Float[Array, "b n"], Float[Array, "b n"], Metrics]:  # fmt: skip
        """As `Causal`; `key` draws random prompts, and without one those of the tokens are taken."""
        check_in_slots(order)
        if (count := prompts(self.spec)) and self.prompt == "random" and key is not None:
            codes = self.spec.codes[0]
            drawn = shares.draw(
                lambda key, shape: jax.random.randint(key, shape, 0, codes), key, (len(tokens), count, 1)
            )
            tokens = jnp.concatenate([drawn, tokens[:, count:]], axis=1)
        return super().loss(tokens, batch, order, drop=drop, key=key, tokenizer=tokenizer)

    def weight(self, batch: Batch, order: Order, images: int) -> Float[Array, "b n"]:
        """As `Causal`; a prompt that says nothing counts nothing."""
        weight, count = super().weight(batch, order, images), prompts(self.spec)
        return weight.at[:, :count].set(0) if count and self.prompt != "codes" else weight
