"""Codes of what a frozen network sees: k-means over its features, and a decoder from them to pixels."""

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ar_jax.files.places import path_of
from ar_jax.nets.resize import resize
from ar_jax.tokenizers.conv import Convolutional, Decoder, init
from ar_jax.tokenizers.quantize import Codebook, VectorLoss, look_up, vector_quantise
from ar_jax.tokens import TokenSpec, grid
from ar_jax.train.exported import Exported
from ar_jax.train.teachers import EfficientNet
from ar_jax.typing import Array, Blocks, Float, Int, Layers, Level, Metrics, Params, PRNGKey, Size, Tokens, typed


class FeatureCodes(Convolutional, nn.Module):
    """Image to the nearest of a teacher's clustered features at each place, and back by a decoder.

    Only the decoder is trained: the codes stay what `python -m ar_jax.codebook` made them (`tokenizer.start` takes its folder).
    The published decoder is a second transformer, from these codes to those of a VQGAN; here it is the VQGAN's own [ours].

    Attributes:
      size: height and width of the images in pixels, multiples of 2^(levels-1).
      features: channels of the decoder's finest level.
      mult: channel multiplier of each level of the decoder, fine to coarse; the coarsest has the grid of the codes, to which the
        teacher's map is brought.
      res_blocks: residual blocks per level, less one.
      latent: channels between codes and decoder.
      codes: number of clusters.
      feature_width: of the teacher's features.
      groups: of the group norms.
      attention: levels of the decoder with attention blocks.
      teacher: the network: `open` reads its parameters, a call with them turns images [b h w 3] in [-1, 1] into maps [b H W c].
        They are no part of the tokenizer's parameters, so its file has to stay where it is.
      channels: of the image.
      dtype: of the convolutions.
    Source: DiGIT (arXiv:2410.12490), whose features are the third-last block's of DINOv2 at 224 pixels, after the last norm.
    """

    size: Size = (256, 256)
    features: int = 128
    mult: tuple[Layers, ...] = (1, 1, 2, 2, 4)
    res_blocks: Blocks = 2
    latent: int = 256
    codes: int = 8192
    feature_width: int = 768
    groups: int = 32
    attention: tuple[Level, ...] = (-1,)
    teacher: EfficientNet | Exported = EfficientNet()
    channels: int = 3
    dtype: Any = jnp.float32

    codebooks = (Codebook(""),)

    @property
    def spec(self) -> TokenSpec:
        return TokenSpec(grid(*self.grid), codes=(self.codes,))

    def setup(self):
        self.decoder = Decoder(
            self.features, self.mult, self.res_blocks, self.channels, self.groups, self.dtype, self.attention
        )
        self.post_quant = nn.Dense(self.latent, kernel_init=init)
        self.frozen = self.param("frozen", nn.initializers.normal(1.0), (self.codes, self.feature_width))

    def init_params(self, key: PRNGKey) -> Params:
        """Without a look at the teacher, which may not be at hand."""
        return self.init(key, self.spec.zeros(1), method="decode")["params"]

    @typed
    def encode(self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None) -> Int[Array, "b n 1"]:
        """Codes of images in [-1, 1], the nearest by squared distance; `key` is unused.

        Raises:
          ValueError: the teacher's file is missing, or its features have another width.
        """
        _, index, _ = vector_quantise(self.latents(image), self._codes(), VectorLoss())
        return index.reshape(len(image), -1, 1)

    def latents(self, image: Float[Array, "b H W c"]) -> Float[Array, "b h w c"]:
        """The teacher's features on the grid of the codes."""
        found = self.teacher(opened(self.teacher), image).astype(jnp.float32)
        if found.shape[-1] != self.feature_width:
            raise ValueError(
                f"tokenizer.feature_width is {self.feature_width}, but the teacher's features are {found.shape[-1]} wide; give "
                "this width, or another teacher"
            )
        return lax.stop_gradient(resize(found, self.grid, "area"))

    @typed
    def embed(self, tokens: Tokens) -> Float[Array, "b n c"]:
        """The clustered features of tokens; vectors in their place stay as they are."""
        return look_up(self._codes(), tokens)

    @typed
    def decode(self, tokens: Tokens, *, key: PRNGKey | None = None) -> Float[Array, "b H W rgb"]:
        """Images, about [-1, 1] but not clipped; `key` is unused."""
        codes = self.embed(tokens)
        return self.decoder(self.post_quant(codes.reshape(len(codes), *self.grid, -1)))

    @typed
    def autoencode(
        self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None
    ) -> tuple[Float[Array, "b H W c"], Metrics, Metrics]:
        """One training pass of the decoder; `key` is unused, and there are no losses but those of the image.

        Returns:
          The reconstruction; {}; and what training may want to look at: "tokens" as of `encode`.
        """
        tokens = self.encode(image)
        return self.decode(tokens), {}, {"tokens": tokens}

    def _codes(self) -> Float[Array, "v c"]:
        return lax.stop_gradient(jnp.asarray(self.frozen, jnp.float32))


@functools.lru_cache(maxsize=4)
def opened(teacher: Any) -> Params:
    """A teacher's parameters, read once a process.

    Raises:
      ValueError: its file is missing.
    """
    if isinstance(teacher, Exported) and not path_of(teacher.path).is_file():
        raise ValueError(f"tokenizer.teacher.path is {teacher.path!r}, which is no file; give what jax.export wrote")
    with ThreadPoolExecutor(1) as apart:  # in a thread of its own, as whoever asks may be tracing a module
        return jax.tree.map(np.asarray, apart.submit(teacher.open).result())
