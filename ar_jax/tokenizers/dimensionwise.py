"""Codes of a continuous tokenizer, made after its training: every number of a token becomes a sub-code of its own."""

from typing import Annotated

import flax.linen as nn
import jax.numpy as jnp

from ar_jax.tokenizers.continuous import Around, Measured
from ar_jax.tokenizers.quantize_normal import normal_codes, normal_quantise
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Float, Having, Int, Metrics, PRNGKey, Tokens, Within, typed


class Dimensionwise(Around, Measured, nn.Module):
    """A continuous tokenizer whose numbers are rounded to one of a few values each; nothing is trained for that.

    Its parameters are those of the tokenizer it is made of, which may be trained through it.

    Attributes:
      base: the tokenizer (`KLVAE`, `GivtVAE`, `Patches`), whose numbers have unit variance.
      levels: values of a number.
      bounds: of the numbers; those beyond are clipped.
      spread: standard deviations of a normal number that the bounds stand for: values lie denser towards the middle.
      shift, scale: see `Measured`; of the numbers of a token, on top of what the base does.
    Source: TokenBridge (arXiv:2503.16430).
    """

    base: Annotated[nn.Module, Having("grid", "encode", "decode")]
    levels: Annotated[int, Within(2, 2**16)] = 64
    bounds: tuple[float, float] = (-5.0, 5.0)
    spread: float = 3.0
    shift: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()

    measures = "continuous"

    @property
    def spec(self) -> TokenSpec:
        spec, (least, most) = self.base.spec, self.bounds
        if not spec.channels:
            raise ValueError(f"tokenizer.base is {type(self.base).__name__}, whose tokens are codes already")
        if not least < most or not self.spread > 0:
            raise ValueError(
                f"tokenizer.bounds is {self.bounds} and tokenizer.spread {self.spread}; needed are rising bounds and a "
                "spread above 0"
            )
        return TokenSpec(spec.coords, codes=(self.levels,) * spec.channels, placed=spec.placed)

    @typed
    def encode(self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None) -> Int[Array, "b n k"]:
        """Codes of images in [-1, 1]; `key` as in the base: with it, posteriors are drawn from before they are rounded."""
        return self.rounded(self.continuous(image, key=key))

    def continuous(self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None) -> Float[Array, "b n k"]:
        """Tokens before they are rounded."""
        return self.standardise(self.base.encode(image, key=key))

    def moments(self, image: Float[Array, "b H W c"]) -> Float[Array, "b n c"]:
        """Of the base."""
        return self.base.moments(image)

    def drawn(self, moments: Float[Array, "b n c"], *, key: PRNGKey | None = None) -> Int[Array, "b n k"]:
        """Codes of `moments`: those that `encode` draws with this key."""
        return self.rounded(self.standardise(self.base.drawn(moments, key=key)))

    def rounded(self, tokens: Float[Array, "b n k"]) -> Int[Array, "b n k"]:
        return normal_quantise(tokens.astype(jnp.float32), self.levels, self.bounds, self.spread)

    @typed
    def embed(self, tokens: Tokens) -> Float[Array, "b n k"]:
        """The values that codes stand for; vectors in their place stay as they are."""
        if jnp.issubdtype(tokens.dtype, jnp.floating):
            return tokens
        return normal_codes(tokens, self.levels, self.bounds, self.spread)

    @typed
    def decode(self, tokens: Tokens, *, key: PRNGKey | None = None) -> Float[Array, "b H W c"]:
        """Images, about [-1, 1] but not clipped; `key` as in the base."""
        return self.base.decode(self.restore(self.embed(tokens)), key=key)

    def autoencode(
        self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None
    ) -> tuple[Float[Array, "b H W c"] | None, Metrics, Metrics]:
        """One training pass of the base; "tokens" are the codes of its images as they are now, without a key."""
        recon, losses, seen = self.base.autoencode(image, key=key)
        return recon, losses, seen | {"tokens": self.encode(image)}
