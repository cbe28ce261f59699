"""The TokenFlow tokenizer: codes that say what is there and how it looks at once, scale by scale."""

import itertools
from typing import Annotated, Any

import flax.linen as nn
import jax.numpy as jnp

from ar_jax.machine.sharding import Rules
from ar_jax.nets.resize import resize
from ar_jax.nets.vit import ViT
from ar_jax.tokenizers.conv import RULES, Decoder, Encoder, init
from ar_jax.tokenizers.quantize import codebook_init, look_up
from ar_jax.tokenizers.quantize_shared import halves_normalised, shared_residual_quantise
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.tokens import Scale, TokenSpec, maps, pyramid, rows, sides
from ar_jax.typing import Array, Blocks, Float, Having, Index, Int, Layers, Many, Metrics, PRNGKey, Share, Tokens, typed


class PatchViT(nn.Module):
    """Square patches of an image, with learned positions, through a ViT; to a map with a place for each patch.

    It stands where the paper fine-tunes a pretrained network (CLIP, ViTamin, SigLIP), and is trained from the start.

    Attributes:
      layers, width, heads: of the ViT.
      patch: side of a patch in pixels.
    """

    layers: Layers = 12
    width: int = 768
    heads: int = 12
    patch: int = 16
    dtype: Any = jnp.float32

    @nn.compact
    @typed
    def __call__(self, image: Float[Array, "b H W c"]) -> Float[Array, "b h w d"]:
        step = (self.patch, self.patch)
        x = nn.Conv(self.width, step, step, "VALID", kernel_init=init, dtype=self.dtype, name="patches")(image)
        place = self.param("positions", nn.initializers.normal(0.02), x.shape[1:])
        rows = (x + place).reshape(len(x), -1, self.width)
        return ViT(self.layers, self.width, self.heads, dtype=self.dtype, name="vit")(rows).reshape(x.shape)


class Semantics(nn.Module):
    """From the semantic part of a latent to the teacher's features, by a ViT with a row for the whole image.

    Attributes:
      layers, width, heads: of the ViT.
      out: width of the teacher's features.
    """

    layers: Layers
    width: int
    heads: int
    out: int
    dtype: Any

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        std, (b, h, w, _) = nn.initializers.normal(0.02), x.shape
        y = nn.Dense(self.width, kernel_init=init, dtype=self.dtype, name="patches")(x).reshape(b, h * w, -1)
        image = jnp.broadcast_to(self.param("image", std, (1, 1, self.width)).astype(y.dtype), (b, 1, self.width))
        y = jnp.concatenate([image, y], axis=1) + self.param("positions", std, (1, h * w + 1, self.width))
        y = ViT(self.layers, self.width, self.heads, dtype=self.dtype, name="vit")(y)[:, 1:]
        return _task(y, self.width, self.out, self.dtype).reshape(b, h, w, -1)


class TokenFlow(VQGAN):
    """Image to grids of codes, coarse to fine, and back. The defaults are the CLIP-B tokenizer's for 256 pixels.

    The latent has a semantic part, of `backbone`, and one of pixels, of the convolutional encoder; both share one index. It
    is a sum over scales; its semantic part must tell a teacher's features (`losses.Teacher` on "semantics", with `projected`
    off). Networks have positions, so it works at one size only.

    Attributes:
      scales: sides, or pairs (height, width), coarse to fine; the last is the size of the latent.
      codes: of the codebook, whose rows hold both parts, the semantic one first.
      code_features: width of the pixel part.
      semantic_features: width of the semantic part.
      backbone: images to a map of the latent's size.
      semantic_layers, semantic_width, semantic_heads: of the semantic decoder.
      target: width of the teacher's features; 0 has no semantic decoder.
      pixel_weight: of the pixel part's distance in the search.
      skip: how often training leaves out one scale.
      others: see `VQGAN`; both parts are normalised always.
    Source: TokenFlow (arXiv:2412.03069).
    """

    codes: int = 32768
    scales: tuple[Scale, ...] = (1, 2, 4, 6, 8, 10, 12, 14, 16)
    semantic_features: int = 32
    backbone: Annotated[nn.Module, Having()] = PatchViT()
    semantic_layers: Blocks = 3
    semantic_width: int = 768
    semantic_heads: int = 12
    target: Many = 512
    pixel_weight: float = 1.0
    skip: Share = 0.1

    @property
    def spec(self) -> TokenSpec:
        if not self.scales or sides(self.scales[-1]) != self.grid:
            raise ValueError(
                f"tokenizer.scales is {self.scales}, but its last one must be the latent's {self.grid}: images of "
                f"{self.size} pixels divided by {self.downsample}"
            )
        return TokenSpec(pyramid(self.scales), codes=(self.codes,))

    @property
    def rules(self) -> Rules:
        return RULES + ViT(1, 1, 1).rules

    def setup(self):
        if not self.l2_norm:
            raise ValueError("tokenizer.l2_norm is False, but TokenFlow normalises both parts of its codes; give True")
        net = {"features": self.features, "res_blocks": self.res_blocks, "groups": self.groups, "dtype": self.dtype}
        self.encoder = Encoder(mult=self.mult, out=self.latent, **net)
        self.decoder = Decoder(mult=self.decoder_mult or self.mult, out=self.channels, **net)
        self.quant = nn.Dense(self.code_features, kernel_init=init)
        self.post_quant = nn.Dense(self.latent, kernel_init=init)
        self.task = Task(self.semantic_features, self.dtype)
        if self.target:
            self.semantics = Semantics(
                self.semantic_layers, self.semantic_width, self.semantic_heads, self.target, self.dtype
            )
        width = self.semantic_features + self.code_features
        self.codebook = self.param("codebook", self._codebook_init, (self.codes, width))

    @typed
    def encode(self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None) -> Int[Array, "b n 1"]:
        """Codes of images in [-1, 1], of all scales; `key` is unused, the codes are deterministic."""
        return self.quantise(self.latents(image))[1][..., None]

    @typed
    def embed(self, tokens: Tokens) -> Float[Array, "b n c"]:
        """The codes of tokens, both parts of length 1, without what other scales add; vectors stay as they are."""
        return look_up(halves_normalised(self.codebook, self.semantic_features), tokens)

    @typed
    def context(self, tokens: Tokens) -> Float[Array, "b n c"]:
        """What is known of every slot from coarser scales; zeros on the first scale.

        The sum so far is enlarged from scale to scale, which is not quite the decoder's sum at full size. A level depends on
        the tokens of the levels before it only, so later ones may be anything.
        """
        codes, known = maps(self.embed(tokens), self.scales), []
        for size, added in zip(self.spec.scales, [None, *codes]):
            known.append(jnp.zeros_like(codes[0]) if added is None else resize(known[-1] + added, size))
        return rows(known)

    @typed
    def decode(self, tokens: Tokens, *, key: PRNGKey | None = None) -> Float[Array, "b H W rgb"]:
        """Images in about [-1, 1], not clipped, from the tokens of all scales or of the first few; `key` is unused."""
        return self.pixels(self.sums(tokens)[-1])

    @typed
    def decode_until(self, tokens: Tokens, level: Index) -> Float[Array, "b H W rgb"]:
        """What `decode` gives of the scales up to a level; later tokens may be anything."""
        return self.pixels(jnp.stack(self.sums(tokens))[level])

    @typed
    def autoencode(
        self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None
    ) -> tuple[Float[Array, "b H W c"], Metrics, Metrics]:
        """One training pass; with a key, one scale may be left out.

        Returns:
          The reconstruction; the weighted losses of the quantiser by name; and what training may want to look at:
          "latents" [b n c], what each slot's code stands for, and "tokens" as of `encode`. The semantic decoder is the module
          "semantics".
        """
        total, index, latents, losses = self.quantise(self.latents(image), key)
        if self.target:
            self.semantics(total[..., : self.semantic_features])
        return self.pixels(total), losses, {"latents": latents, "tokens": index[..., None]}

    def latents(
        self, image: Float[Array, "b H W c"], seen: Float[Array, "b h w d"] | None = None
    ) -> Float[Array, "b h w c"]:
        """What the quantiser sees: both parts; `seen` is what the backbone makes of the images, if it is known."""
        seen = self.backbone(image) if seen is None else seen
        pixels = self.quant(self.encoder(image))
        if seen.shape[1:3] != pixels.shape[1:3]:
            raise ValueError(
                f"tokenizer.backbone gives maps of {seen.shape[1:3]}, but the latent is {pixels.shape[1:3]}; they must be equal"
            )
        return jnp.concatenate([self.task(seen), pixels], axis=-1).astype(jnp.float32)

    def quantise(
        self, latents: Float[Array, "b h w c"], key: PRNGKey | None = None
    ) -> tuple[Float[Array, "b h w c"], Int[Array, "b n"], Float[Array, "b n c"], Metrics]:
        """See `shared_residual_quantise`."""
        first, sizes = self.semantic_features, self.spec.scales
        return shared_residual_quantise(
            latents, self.codebook, first, sizes, self.vq, self.pixel_weight, self.skip, key
        )

    def sums(self, tokens: Tokens) -> list[Float[Array, "b h w c"]]:
        """The latent as it is known after each of the first scales, whose tokens are given."""
        return list(itertools.accumulate(resize(x, self.grid) for x in maps(self.embed(tokens), self.scales)))

    def pixels(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b H W c"]:
        """Images from both parts of a latent, of which the second counts."""
        return self.decoder(self.post_quant(latents[..., self.semantic_features :]))

    def _codebook_init(self, key, shape):
        return halves_normalised(codebook_init(l2_norm=False)(key, shape), self.semantic_features)


class Task(nn.Module):
    """Two linear layers with a tanh between them, as wide as their input."""

    out: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b c"]:
        return _task(x, x.shape[-1], self.out, self.dtype)


def _task(x, width, out, dtype):
    x = nn.Dense(width, kernel_init=init, dtype=dtype, name="task1")(x)
    return nn.Dense(out, kernel_init=init, dtype=dtype, name="task2")(jnp.tanh(x)).astype(jnp.float32)
