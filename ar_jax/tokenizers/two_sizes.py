"""Codes of a small picture of the image, then those of the image, by one tokenizer."""

import math
from typing import Annotated, Any

import flax.linen as nn
import jax.numpy as jnp

from ar_jax.nets.resize import resize, touched
from ar_jax.tokenizers.continuous import Around
from ar_jax.tokens import Scale, TokenSpec, pyramid, sides
from ar_jax.typing import Array, Bool, Float, Having, Int, Metrics, PRNGKey, Tokens, typed


class TwoSizes(Around, nn.Module):
    """A tokenizer of codes in a grid, before whose codes come those that it gives the image made small; `decode` takes the grid.

    Its parameters are those of the tokenizer it is made of, which may be trained through it, on whole images alone.

    Attributes:
      base: the tokenizer, of images of any size (`VQGAN`, `MaskgitVQGAN`).
      prompt: rows and columns of the small picture's codes, or a side; a code has as many pixels there as in the image. 0 has none.
    Source: a reading of "Autoregressive Image Generation with Vision Full-view Prompt", whose abstract alone was at hand.
    """

    base: Annotated[nn.Module, Having("grid", "latents", "quantise", "embed")]
    prompt: Scale = 4

    @property
    def spec(self) -> TokenSpec:
        """Level 0 is the small picture, level 1 the image.

        Raises:
          ValueError: the base has no grid of codes, or the picture is not smaller than the image.
        """
        spec, grid = self.base.spec, self.base.grid
        if len(spec.codes) != 1 or not spec.placed or spec.scales != (grid,):
            raise ValueError(
                f"tokenizer.base is {type(self.base).__name__}, but a small picture goes before tokens of one code in one grid"
            )
        if not any(sides(self.prompt)):
            return spec
        if not all(0 < few <= many for few, many in zip(sides(self.prompt), grid)):
            raise ValueError(
                f"tokenizer.prompt is {self.prompt}; it must be 1 to {grid}, as many as the image has, or 0 for none"
            )
        return TokenSpec(pyramid((self.prompt, grid)), codes=spec.codes)

    @property
    def codebooks(self) -> tuple:
        """Those of the base."""
        return getattr(self.base, "codebooks", ())

    @property
    def prompts(self) -> int:
        """Codes of the small picture."""
        return math.prod(sides(self.prompt))

    @typed
    def encode(self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None) -> Int[Array, "b n 1"]:
        """Codes of images in [-1, 1], those of the small picture first; `key` as in the base."""
        tokens = self.base.encode(image, key=key)
        return jnp.concatenate([self.small(image)[1], tokens], axis=1) if self.prompts else tokens

    def small(self, image: Float[Array, "b H W c"]) -> tuple[Float[Array, "b p z"], Int[Array, "b p 1"]]:
        """Latents and codes of images made small."""
        size = tuple(
            pixels * few // many for pixels, few, many in zip(self.base.size, sides(self.prompt), self.base.grid)
        )
        latents = self.base.latents(resize(image, size, "area"))
        index = self.base.quantise(latents)[1]
        return latents.reshape(len(latents), self.prompts, -1), index.reshape(len(index), self.prompts, 1)

    @typed
    def embed(self, tokens: Tokens) -> Float[Array, "b n c"]:
        """What codes stand for, as the base says."""
        return self.base.embed(tokens)

    @typed
    def decode(self, tokens: Tokens, *, key: PRNGKey | None = None) -> Float[Array, "b H W rgb"]:
        """Images of the grid, about [-1, 1] but not clipped; `key` as in the base."""
        return self.base.decode(tokens[:, self.prompts :], key=key)

    def autoencode(
        self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None
    ) -> tuple[Float[Array, "b H W c"], Metrics, Metrics]:
        """One training pass of the base; "tokens" and "latents" are also of the small picture."""
        recon, losses, seen = self.base.autoencode(image, key=key)
        return recon, losses, self.with_small(image, seen) if self.prompts else seen

    def with_small(self, image: Float[Array, "b H W c"], seen: dict[str, Any]) -> Metrics:
        latents, tokens = self.small(image)
        of_image = seen["latents"].reshape(len(latents), -1, latents.shape[-1])
        return seen | {
            "tokens": jnp.concatenate([tokens, seen["tokens"]], axis=1),
            "latents": jnp.concatenate([latents, of_image], axis=1),
        }

    def known(self, tokens: Tokens, free: Bool[Array, "b H W"]) -> Bool[Array, "b n"]:
        """What editing keeps: cells of the image without a free pixel, and the small picture, which is of the whole, if there is none."""
        whole = jnp.broadcast_to(~free.any((1, 2))[:, None], (len(free), self.prompts))
        return jnp.concatenate([whole, ~touched(free, self.base.grid).reshape(len(free), -1)], axis=1)
