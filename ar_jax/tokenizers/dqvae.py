"""DQ-VAE: a tokenizer that gives plain regions one code and detailed ones four."""

from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ar_jax.tokenizers import conv
from ar_jax.tokenizers.conv import Convolutional, Decoder
from ar_jax.tokenizers.quantize import Codebook, codebook_init, distances, straight_through
from ar_jax.tokenizers.quantize_averaged import Average
from ar_jax.tokens import TokenSpec, pyramid
from ar_jax.typing import Array, Blocks, Bool, Float, Int, Layers, Level, Metrics, PRNGKey, Share, Size, Tokens, typed

COARSE = 0.25  # what a place of a coarse cell counts in the quantiser's losses: its four are one code
BINS, SPREAD = 32, 0.01  # of the histogram of grey that measures detail
GREY = (0.2989, 0.5870, 0.1140)


class Mixed(NamedTuple):
    """A map of two densities.

    Attributes:
      latents: at the fine density; the four of a coarse cell are equal.
      fine: cells of the coarse grid that are fine.
      gate: of every cell, coarse and fine: logits, or in training the drawn choice, which has their gradient.
    """

    latents: Float[Array, "b H W z"]
    fine: Bool[Array, "b h w"]
    gate: Float[Array, "b h w 2"]


class DQVAE(Convolutional, nn.Module):
    """Image to codes of two densities and back: every cell of the coarse grid has one code, or four of the fine grid.

    Tokens are all cells of the coarse grid, then all places of the fine one; those that an image does not use hold the code
    `codes`, which stands for nothing. The defaults are the released model's.

    Attributes:
      size: height and width of the images in pixels, multiples of 2^(levels-1).
      features: channels of the finest level.
      mult: channel multiplier of each level, fine to coarse; the coarse grid is the last level's, the fine one that of the
        level before.
      decoder_mult: the decoder's, which begins on the fine grid; empty takes `mult` without its last.
      res_blocks: residual blocks per encoder level; the decoder has one more.
      latent: channels between the network and the projections around the quantiser.
      codes: size of the codebook.
      code_features: width of a code.
      groups: of the group norms.
      router_groups: of those before the router; 0 is `groups`.
      attention: levels of the encoder with attention; the decoder has it on those that are its own too.
      router: what makes a cell fine: a network that sees the features of both densities and is trained with the rest, or the
        entropy of the grey in the cell's pixels, if it is above `threshold` (`entropy_threshold` finds it).
      threshold: in nats.
      ratio: share of fine cells that the budget's loss asks of a network's choice.
      budget: weight of that loss.
      commit: weight of the loss that pulls latents to their codes; the codes follow averages of latents, without a gradient.
      channels: of the image.
      dtype: of the convolutions; router and quantiser are float32.
    Source: DQ-VAE (arXiv:2305.11718).
    """

    size: Size = (256, 256)
    features: int = 128
    mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    decoder_mult: tuple[Layers, ...] = ()
    res_blocks: Blocks = 2
    latent: int = 256
    codes: int = 1024
    code_features: int = 256
    groups: int = 32
    router_groups: int = 0
    attention: tuple[Level, ...] = (-2, -1)
    router: Literal["features", "entropy"] = "features"
    threshold: float = 1.6778
    ratio: Share = 0.5
    budget: float = 10.0
    commit: float = 0.25
    channels: int = 3
    dtype: Any = jnp.float32

    codebooks = (Codebook("codebook", average=Average()),)

    @property
    def fine_grid(self) -> tuple[int, int]:
        """Height and width of the fine grid."""
        return 2 * self.grid[0], 2 * self.grid[1]

    @property
    def spec(self) -> TokenSpec:
        return TokenSpec(pyramid((self.grid, self.fine_grid)), codes=(self.codes + 1,))

    def setup(self):
        if self.router not in ("features", "entropy"):
            raise ValueError(f"tokenizer.router is {self.router!r}; it must be features or entropy")
        levels = len(self.mult)
        if levels < 2 or len(self.decoder_mult or self.mult[:-1]) != levels - 1:
            raise ValueError(
                f"tokenizer.mult is {self.mult} and decoder_mult {self.decoder_mult}; the encoder has two levels or more, "
                "the decoder one less"
            )
        net = {"features": self.features, "res_blocks": self.res_blocks, "groups": self.groups, "dtype": self.dtype}
        attention = tuple(level % levels for level in self.attention)
        self.encoder = DualEncoder(mult=self.mult, out=self.latent, attention=attention, **net)
        attention = tuple(level for level in attention if level < levels - 1)
        self.decoder = Decoder(mult=self.decoder_mult or self.mult[:-1], out=self.channels, attention=attention, **net)
        if self.router == "features":
            self.gate = Router(self.latent, self.router_groups or self.groups)
        self.quant = nn.Dense(self.code_features, kernel_init=conv.init)
        self.post_quant = nn.Dense(self.latent, kernel_init=conv.init)
        self.place = Place(self.latent)
        self.codebook = self.param("codebook", codebook_init(False), (self.codes, self.code_features))
        # what a place without a code decodes from; never trained, as such are never decoded
        self.nothing = self.param("nothing", nn.initializers.zeros, (1, self.code_features))

    @typed
    def encode(self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None) -> Int[Array, "b n 1"]:
        """Codes of images in [-1, 1]; `key` is unused, cells are fine where the router says so."""
        found = self.mixed(image)
        return self.tokens(self.quantise(self.quant(found.latents))[1], found.fine)

    @typed
    def embed(self, tokens: Tokens) -> Float[Array, "b n c"]:
        """The codes of tokens; vectors in their place stay as they are."""
        if jnp.issubdtype(tokens.dtype, jnp.floating):
            return tokens
        return jnp.concatenate([jnp.asarray(self.codebook), jnp.asarray(self.nothing)])[tokens[..., 0]]

    @typed
    def decode(self, tokens: Tokens, *, key: PRNGKey | None = None) -> Float[Array, "b H W rgb"]:
        """Images, about [-1, 1] but not clipped; where a cell has both densities, fine codes count. `key` is unused.

        Raises:
          ValueError: vectors, which do not say which places have one.
        """
        if jnp.issubdtype(tokens.dtype, jnp.floating):
            raise ValueError(
                "DQVAE decodes codes, not vectors in their place: a vector does not say that there is none"
            )
        return self.pixels(self.code_map(tokens))

    def code_map(self, tokens: Int[Array, "b n 1"]) -> Float[Array, "b H W c"]:
        """Code vectors at the fine density."""
        coarse, fine = self.split(tokens[..., 0])
        return self.embed(jnp.where(fine == self.codes, _larger(coarse), fine).reshape(len(tokens), -1, 1)).reshape(
            len(tokens), *self.fine_grid, -1
        )

    @nn.nowrap
    def split(self, tokens: Int[Array, "b n"]) -> tuple[Int[Array, "b h w"], Int[Array, "b H W"]]:
        """The tokens of both grids."""
        n = self.grid[0] * self.grid[1]
        return tokens[:, :n].reshape(-1, *self.grid), tokens[:, n:].reshape(-1, *self.fine_grid)

    @nn.nowrap
    def tokens(self, index: Int[Array, "b H W"], fine: Bool[Array, "b h w"]) -> Int[Array, "b n 1"]:
        """Tokens from a map of codes at the fine density, and which cells are fine."""
        coarse = jnp.where(fine, self.codes, index[:, ::2, ::2])
        places = jnp.where(_larger(fine), index, self.codes)
        return jnp.concatenate([x.reshape(len(x), -1, 1) for x in (coarse, places)], axis=1)

    @typed
    def autoencode(
        self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None
    ) -> tuple[Float[Array, "b H W c"], Metrics, Metrics]:
        """One training pass; with a key, the network's choice of cells is drawn, and the budget's loss is that of the draw.

        Returns:
          The reconstruction; the weighted losses of quantiser and budget by name; and what training may want to look at:
          "latents" [b n c] and "tokens" as of `encode`, "members" (see `tokenizers`), "fine" [b h w].
        """
        noise = None
        if key is not None and self.router == "features":
            noise = jax.random.gumbel(key, (len(image), *self.grid, 2))
        found = self.mixed(image, noise)
        z = self.quant(found.latents)
        codes, index, losses = self.quantise(z, found.fine)
        if noise is not None:
            losses["budget"] = self.budget * budget_loss(found.gate, self.ratio)
        z = lax.stop_gradient(z)
        latents = jnp.concatenate([x.reshape(len(x), -1, x.shape[-1]) for x in (z[:, ::2, ::2], z)], axis=1)
        members = {"codebook": (z.reshape(-1, z.shape[-1]), index.reshape(-1))}
        seen = {"latents": latents, "tokens": self.tokens(index, found.fine), "members": members, "fine": found.fine}
        return self.pixels(codes), losses, seen

    def mixed(self, image: Float[Array, "b H W c"], noise: Float[Array, "b h w 2"] | None = None) -> Mixed:
        """The map of an image; with Gumbel noise, the choice of a network is drawn and has the gradient of its logits."""
        coarse, fine = self.encoder(image)
        if self.router == "entropy":
            patch = self.downsample
            chosen = patch_entropy(image, patch) > self.threshold
            gate = jnp.stack([~chosen, chosen], axis=-1).astype(jnp.float32)
            return Mixed(jnp.where(_larger(chosen)[..., None], fine, _larger(coarse)), chosen, gate)
        gate = self.gate(coarse, fine)
        if noise is not None:
            soft = jax.nn.softmax(gate + noise)
            gate = straight_through(soft, jax.nn.one_hot(soft.argmax(-1), 2))
        chosen = gate[..., 1] > gate[..., 0]
        latents = jnp.where(_larger(chosen)[..., None], fine, _larger(coarse))
        if noise is not None:
            latents *= _larger(gate.max(-1, keepdims=True))  # 1, with the gradient of what was chosen
        return Mixed(latents, chosen, gate)

    def quantise(
        self, latents: Float[Array, "b H W c"], fine: Bool[Array, "b h w"] | None = None
    ) -> tuple[Float[Array, "b H W c"], Int[Array, "b H W"], Metrics]:
        """The nearest codes, straight-through, their indices, and weighted losses; places of coarse cells count a quarter."""
        z, codebook = latents.astype(jnp.float32), lax.stop_gradient(jnp.asarray(self.codebook))
        index = distances(z, codebook).argmin(-1).astype(jnp.int32)
        codes = codebook[index]
        weight = 1.0 if fine is None else jnp.where(_larger(fine), 1.0, COARSE)[..., None]
        distance = (weight * jnp.square(codes - z)).mean()
        # the first says how far codes are from latents, but has no gradient: codes follow averages
        losses = {"codebook": lax.stop_gradient(distance), "commit": self.commit * distance}
        return straight_through(z, codes), index, losses

    def pixels(self, codes: Float[Array, "b H W c"]) -> Float[Array, "b h w rgb"]:
        """Images from a map of code vectors at the fine density."""
        return self.decoder(self.place(self.post_quant(codes)))


class DualEncoder(nn.Module):
    """Image to two maps: of the last level, and of the level before. Attributes: as of `conv.Encoder`."""

    features: int
    mult: tuple[int, ...]
    res_blocks: int
    out: int
    groups: int = 32
    dtype: Any = jnp.float32
    attention: tuple[int, ...] = (-2, -1)

    middle = last_silu = True

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "b H W c"]) -> tuple[Float[Array, "b h w z"], Float[Array, "b g v z"]]:
        x = conv.conv3(self.features, self.dtype, name="conv_in")(x)
        for level, mult in enumerate(self.mult):
            fine = x  # in the end that of the level before the last
            x = conv.down(self, x, level - 1) if level else x
            x = conv.blocks(self, x, level, mult, self.res_blocks)
        coarse, fine = conv.middle(self, x, "_coarse"), conv.middle(self, fine, "_fine")
        return conv.last(self, coarse, self.out, "_coarse"), conv.last(self, fine, self.out, "_fine")


class Router(nn.Module):
    """Logits of a cell being coarse or fine, from the features of both densities."""

    width: int
    groups: int

    @nn.compact
    def __call__(self, coarse: Float[Array, "b h w z"], fine: Float[Array, "b H W z"]) -> Float[Array, "b h w 2"]:
        coarse, fine = (
            conv.norm(self.groups, jnp.float32, name=f"norm_{name}")(x)
            for name, x in (("coarse", coarse), ("fine", fine))
        )
        both = jnp.concatenate([coarse, nn.avg_pool(fine, (2, 2), (2, 2))], axis=-1)
        return nn.Dense(2, name="out")(nn.silu(nn.Dense(2 * self.width, name="hidden")(both)))


class Place(nn.Module):
    """Adds to a map what tells places apart: sines of learned directions, and learned vectors of column and row."""

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "b H W z"]) -> Float[Array, "b H W z"]:
        _, height, width, _ = x.shape
        row, column = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
        place = jnp.asarray(np.stack([column, row], axis=-1), jnp.float32)
        waves = nn.Dense(
            self.width, kernel_init=_uniform(1.5 * 2**0.5), bias_init=_uniform(0.5**0.5),
            precision=lax.Precision.HIGHEST, name="fourier",
        )(place)  # fmt: skip
        table = nn.initializers.truncated_normal(1.0)
        rows, columns = self.param("row", table, (height, self.width)), self.param("column", table, (width, self.width))
        return x + jnp.sin(waves) + columns[None] + rows[:, None]


@typed
def budget_loss(gate: Float[Array, "b h w 2"], ratio: float) -> Float[Array, ""]:
    """Squared distance of the share of fine cells from `ratio`, and that of the coarse ones from the rest.

    The share is counted by codes: 0 if every cell has one, 1 if every one has four. Only of hard gates is it such a share.
    """
    cells = gate.shape[1] * gate.shape[2]
    codes = (gate[..., 0] + 4 * gate[..., 1]).sum() / len(gate)
    share = (codes - cells) / (3 * cells)
    return 2 * jnp.square(share - ratio)


@typed
def patch_entropy(image: Float[Array, "b H W c"], patch: int) -> Float[Array, "b h w"]:
    """Entropy in nats of a soft histogram of the grey in every square of `patch` pixels; images in [-1, 1]."""
    grey = image @ jnp.asarray(GREY, jnp.float32) if image.shape[-1] == 3 else image.mean(-1)
    b, height, width = grey.shape
    grey = grey.reshape(b, height // patch, patch, width // patch, patch).swapaxes(2, 3)
    grey = grey.reshape(b, height // patch, width // patch, -1)
    bins = np.linspace(-1, 1, BINS, dtype=np.float32)
    count = jnp.exp(-jnp.square(grey[..., None] - bins) / (2 * SPREAD**2)).mean(-2)
    p = count / jnp.maximum(count.sum(-1, keepdims=True), 1e-30)
    # the published guard, 1e-40 inside the logarithm, is 0 where subnormal numbers are flushed
    return -(p * jnp.log(jnp.maximum(p, 1e-30))).sum(-1)


def entropy_threshold(image: Float[Array, "b H W c"], patch: int, ratio: float) -> float:
    """The entropy above which the share `ratio` of the patches of some images lies.

    The published table of percentiles was made with other bins, so its shares are not those that arise.
    """
    return float(jnp.quantile(patch_entropy(image, patch), 1 - ratio))


def _larger(x: Array) -> Array:
    """Every cell twice in both directions, [b h w ...]."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


def _uniform(limit: float) -> Any:
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -limit, limit)
