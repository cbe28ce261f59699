"""GIVT's variational autoencoder."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ar_jax.machine.sharding import Rules
from ar_jax.tokenizers.conv import norm
from ar_jax.tokenizers.kl_vae import KLVAE
from ar_jax.typing import Array, Float, Level, PRNGKey, typed


class GivtVAE(KLVAE):
    """As `KLVAE`, but without attention, with average pooling, and with tokens that are the latents as they are.

    Attributes: see `KLVAE`; `res_blocks` is the number at every level and in the middle.
    Source: GIVT (arXiv:2312.02116).
    """

    shift: tuple[float, ...] = (0.0,)
    scale: tuple[float, ...] = (1.0,)
    encoder_attention: tuple[Level, ...] = ()

    @property
    def rules(self) -> Rules:
        return ()

    @property
    def last_layer(self) -> str:
        return f"decoder/Conv_{len(self.mult)}/kernel"

    def setup(self):
        if self.encoder_attention or self.decoder_attention:
            levels = self.encoder_attention, self.decoder_attention
            raise ValueError(f"encoder_attention and decoder_attention are {levels}, but GivtVAE has no attention")
        net = (self.features, self.mult, self.res_blocks, self.groups, self.dtype)
        self.encoder, self.decoder = Encoder(2 * self.latent, *net), Decoder(self.channels, *net)

    @typed
    def decode(self, tokens: Float[Array, "b n c2"], *, key: PRNGKey | None = None) -> Float[Array, "b H W c"]:
        """Images in [-1, 1]; `key` is unused."""
        return jnp.clip(super().decode(tokens), -1, 1)

    def posterior(self, image: Float[Array, "b H W c"]) -> tuple[Float[Array, "b h w c2"], Float[Array, "b h w c2"]]:
        """Mean and log-variance of every latent number, float32."""
        mean, logvar = jnp.split(self.encoder((image + 1) / 2).astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -30, 20)

    def pixels(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b H W c2"]:
        """Images from latents as the posterior gives them."""
        return 2 * self.decoder(latents).astype(jnp.float32) - 1


class ResBlock(nn.Module):
    """norm, swish, 3x3 convolution, twice; plus the input, or plus a projection of all this where widths differ."""

    features: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        y = x
        for i in range(2):
            y = nn.silu(norm(self.groups, self.dtype, name=f"GroupNorm_{i}")(y))
            y = nn.Conv(self.features, (3, 3), use_bias=False, dtype=self.dtype, name=f"Conv_{i}")(y)
        if x.shape[-1] != self.features:  # the published network projects what it adds to, not the input
            x = nn.Conv(self.features, (1, 1), use_bias=False, dtype=self.dtype, name="Conv_2")(y)
        return x + y


class Encoder(nn.Module):
    """Image to latent grid; names are the released ones."""

    out: int
    features: int
    mult: tuple[int, ...]
    res_blocks: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.features, (3, 3), use_bias=False, dtype=self.dtype, name="Conv_0")(x)
        wide = [self.features * mult for mult in self.mult]
        block = 0
        for level, features in enumerate([*wide, wide[-1]]):
            if 0 < level < len(wide):
                x = nn.avg_pool(x, (2, 2), (2, 2))
            for _ in range(self.res_blocks):
                x = ResBlock(features, self.groups, self.dtype, name=f"ResBlock_{block}")(x)
                block += 1
        x = nn.silu(norm(self.groups, self.dtype, name="GroupNorm_0")(x))
        return nn.Conv(self.out, (1, 1), dtype=self.dtype, name="Conv_1")(x)


class Decoder(nn.Module):
    """Latent grid to image; names are the released ones."""

    out: int
    features: int
    mult: tuple[int, ...]
    res_blocks: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        wide = [self.features * mult for mult in reversed(self.mult)]
        convolutions = iter(f"Conv_{i}" for i in range(len(wide) + 1))
        x = nn.Conv(wide[0], (3, 3), dtype=self.dtype, name=next(convolutions))(x)
        block = 0
        for level, features in enumerate([wide[0], *wide]):
            if level > 1:
                x = x.repeat(2, axis=1).repeat(2, axis=2)
                x = nn.Conv(x.shape[-1], (3, 3), dtype=self.dtype, name=next(convolutions))(x)
            for _ in range(self.res_blocks):
                x = ResBlock(features, self.groups, self.dtype, name=f"ResBlock_{block}")(x)
                block += 1
        x = nn.silu(norm(self.groups, self.dtype, name="GroupNorm_0")(x))
        return nn.Conv(self.out, (3, 3), dtype=self.dtype, name=next(convolutions))(x)
