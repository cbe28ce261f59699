"""What tokenizers around one quantiser share."""

import flax.linen as nn

from ar_jax.typing import Array, Float, Int, Metrics, PRNGKey, Tokens, typed


class Quantised(nn.Module):
    """A tokenizer whose tokens are the codes of one array of latents, from the parts in which such tokenizers differ.

    They are `grid`, the shape of that array: (rows, columns), or (n,) of tokens on a line; `latents`, images to [b *grid z];
    `quantise`, latents to codes, their numbers and the losses by name; `embed`, tokens to [b n c]; and `pixels`, codes
    [b *grid c] to images.
    """

    @typed
    def encode(self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None) -> Int[Array, "b n k"]:
        """Codes of images in [-1, 1]; `key` is unused, the codes are deterministic."""
        _, index, _ = self.quantise(self.latents(image))
        return self.in_line(index)

    @typed
    def decode(self, tokens: Tokens, *, key: PRNGKey | None = None) -> Float[Array, "b H W rgb"]:
        """Images, about [-1, 1] but not clipped; `key` is unused."""
        codes = self.embed(tokens)
        return self.pixels(codes.reshape(len(codes), *self.grid, -1))

    @typed
    def autoencode(
        self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None
    ) -> tuple[Float[Array, "b H W c"], Metrics, Metrics]:
        """One training pass; `key` is unused.

        Returns:
          The reconstruction; the weighted losses of the quantiser by name; and what training may want to look at:
          "latents" [b *grid z] before quantisation and "tokens" as of `encode`.
        """
        latents = self.latents(image)
        codes, index, losses = self.quantise(latents)
        return self.pixels(codes), losses, {"latents": latents, "tokens": self.in_line(index)}

    def in_line(self, index: Array) -> Int[Array, "b n k"]:
        """Tokens of what the quantiser chose, [b *grid] or [b *grid k]."""
        return index.reshape(len(index), -1, len(self.spec.codes))
