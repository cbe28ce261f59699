"""What tokenizers share whose tokens lie on a line, of which any prefix decodes."""

from typing import Annotated

import jax
import jax.numpy as jnp

from ar_jax.tokenizers.quantised import Quantised
from ar_jax.tokens import TokenSpec, grid
from ar_jax.typing import Array, Float, Index, Int, Key, PRNGKey, Tokens, Within, typed

Length = Annotated[int, Within(0, 2**16)]
Registers = Annotated[int, Within(1, 2**16)]


class Ordered(Quantised):
    """For modules with the parts of `Quantised` (`latents`, `quantise`, `embed`), and

    - `code_sizes`: of the sub-codes of a token;
    - `shown`: codes [b registers c], how many of them are known [b], and a key, to images;
    - these fields.

    Attributes:
      registers: tokens of an image.
      length: so many tokens, the first ones, are made and decoded; 0 is all. It changes nothing of the network.
    """

    generative = True  # the decoder starts from noise

    def __post_init__(self):
        super().__post_init__()
        if self.length and self.length not in self.ends:
            every = self.ends == tuple(range(1, self.registers + 1))
            some = f"1 to {self.registers}" if every else ", ".join(map(str, self.ends))
            raise ValueError(f"tokenizer.length is {self.length}; it must be one of {some}, or 0 for all")

    @property
    def ends(self) -> tuple[int, ...]:
        """Numbers of tokens at which more can be seen, rising; the last is all that the network has."""
        return tuple(range(1, self.registers + 1))

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Of `ends`, those up to `length`."""
        return tuple(end for end in self.ends if end <= self.spec.n)

    @property
    def grid(self) -> tuple[int]:
        """Tokens on a line."""
        return (self.length or self.registers,)

    @property
    def spec(self) -> TokenSpec:
        return TokenSpec(grid(1, *self.grid), codes=self.code_sizes, placed=False)

    @typed
    def decode(self, tokens: Tokens, *, key: PRNGKey | Key[Array, "b"] | None = None) -> Float[Array, "b H W rgb"]:
        """Images, about [-1, 1] but not clipped; `key` as of `prefix`."""
        return self.prefix(tokens, self.spec.n, key=key)

    @typed
    def prefix(
        self, tokens: Tokens, count: Index | Int[Array, "b"], *, key: PRNGKey | Key[Array, "b"] | None = None
    ) -> Float[Array, "b H W rgb"]:
        """Images that the first tokens show, about [-1, 1] but not clipped.

        Args:
          tokens: all of them; those from `count` on may be anything.
          count: how many are known, of all images or of each; one program serves all.
          key: of the noise that images start from, one for all images or one for each; None always takes the same.
        """
        codes = self.embed(tokens)
        missing = self.registers - codes.shape[1]
        codes = jnp.pad(codes, ((0, 0), (0, missing), (0, 0)))
        count = jnp.broadcast_to(jnp.asarray(count, jnp.int32), (len(codes),))
        return self.shown(codes, jnp.clip(count, 0, self.spec.n), key)


@typed
def starts(key: PRNGKey | Key[Array, "b"] | None, images: int, shape: tuple[int, ...]) -> Float[Array, "b *shape"]:
    """Unit normal noise of images, which depends on nothing but their key, or their number where there is one for all."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(image_keys(key, images))


def image_keys(key: PRNGKey | Key[Array, "b"] | None, images: int) -> Key[Array, "b"]:
    """A key of each image: those that are given, or of one for all, with its number folded in."""
    key = jax.random.key(0) if key is None else key
    return key if key.shape else jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(images))
