"""DetailFlow's tokenizer: codes on a line, of which the first ones show an image at a resolution that grows with their number."""

import math
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ar_jax.machine import shares
from ar_jax.machine.sharding import Rules
from ar_jax.nets.linear import Linear
from ar_jax.nets.mlp import xavier
from ar_jax.nets.resize import area_matrix, bicubic_matrix, smooth_matrix
from ar_jax.nets.vit import Siglip
from ar_jax.tokenizers.continuous import cells, patchify, unpatchify
from ar_jax.tokenizers.ordered import Length, Ordered, Registers
from ar_jax.tokenizers.quantize import (
    Codebook,
    VectorLoss,
    codebook_init,
    distances,
    look_up,
    normalise,
    vector_quantise,
)
from ar_jax.tokens import TokenSpec, grid
from ar_jax.typing import (
    Array,
    Float,
    Int,
    Key,
    Layers,
    Many,
    Metrics,
    Params,
    PRNGKey,
    Share,
    Size,
    Tokens,
    Within,
    finite,
    typed,
)


def table_init(width: int) -> Any:
    """How places begin, as in SigLIP."""
    return nn.initializers.normal(width**-0.5)


class PatchRows(nn.Module):
    """Rows of the patches of an image, with learned places that are resized to their grid.

    Attributes:
      width: of the rows.
      cell: side of a patch in pixels.
      table: side of the learned table of places.
    """

    width: int
    cell: int
    table: int
    dtype: Any = jnp.float32

    no_decay = ("places", "bias")

    @nn.compact
    @typed
    def __call__(self, image: Float[Array, "b H W c"]) -> Float[Array, "b h w d"]:
        height, width = cells(image.shape[1:3], (self.cell, self.cell))
        rows = Linear(self.width, self.dtype, None, xavier, bias=True, name="patch")(patchify(image, self.cell))
        places = self.param("places", table_init(self.width), (self.table, self.table, self.width))
        matrices = (smooth_matrix(side, self.table)[None] for side in (height, width))
        return rows.reshape(len(rows), height, width, -1) + resized(places[None], *matrices).astype(rows.dtype)


class Features(nn.Module):
    """What a tower of SigLIP 2 sees at every place of an image; its last norm comes twice, as DetailFlow's teacher has it.

    Attributes:
      net: the tower.
      cell, table, dtype: see `PatchRows`.
    """

    net: Siglip
    cell: int = 16
    table: int = 16
    dtype: Any = jnp.float32

    def setup(self):
        self.patches = PatchRows(self.net.width, self.cell, self.table, self.dtype)

    @typed
    def __call__(self, image: Float[Array, "b H W c"]) -> Float[Array, "b h w d"]:
        """Of images in [-1, 1]."""
        x = self.patches(image)
        rows = x.reshape(len(x), -1, x.shape[-1])
        rows = self.net.norm(self.net(rows, np.zeros(rows.shape[1], np.int32)))
        return rows.reshape(x.shape)


class DetailFlow(Ordered):
    """A square image to a line of codes, coarse to fine, and back. The defaults are DetailFlow-16's.

    Any first codes whose groups are whole are an image of a side that grows with their number, from one pixel to all. In
    training some images are decoded so and compared with themselves at that side; and every image is decoded twice: from its
    codes, and from codes with a mistake, after which the encoder goes on as well as it can.

    Attributes:
      size: height and width of the images in pixels, a square of whole cells.
      cell: side in pixels of what makes a row of the networks.
      registers, length: see `Ordered`; whole groups, or fewer codes than `single`.
      group: codes that a generator draws at once.
      single: first codes, whole groups of them, that it draws one by one; the encoder's registers see the patches and what
        is drawn before them.
      encoder: of patches and registers.
      decoder: of the rows that become patches and of the codes; they all see each other.
      codes: size of the codebook.
      code_features: width of a code; latents and codes are normalised, so search is by cosine.
      power: of how the side of the image grows: t of n codes lack (n - t)^power / (n - 1)^power of it.
      table: side of the learned tables of places, which are resized to the grid of patches; 0 is that of the whole image.
      fewer: share of images in training that are decoded from a part of their codes, of all parts alike.
      nearest: a mistake takes one of so many codes nearest to each latent, all alike.
      vq: weights of the quantiser's losses.
      aligned: hidden width and width of what a perceptron tells of the first code, for a teacher ("features", one place);
        () is none.
      channels: of the image.
      dtype: of the networks' projections; the quantiser is float32.
    Source: DetailFlow (arXiv:2505.21473). There all images of a batch lack the same codes and have their mistake at the same
    place, and are compared at the smaller side itself; here both images are enlarged to the whole one.
    """

    size: Size = (256, 256)
    cell: Annotated[int, Within(1, 1024)] = 16
    registers: Registers = 128
    group: Registers = 8
    single: Length = 8
    encoder: Siglip = Siglip(12, 1152, 16, hidden=4304)
    decoder: Siglip = Siglip(12, 768, 12)
    codes: int = 8192
    code_features: int = 8
    power: float = 1.5
    table: Many = 0
    fewer: Share = 0.2
    nearest: Layers = 50
    vq: VectorLoss = VectorLoss()
    aligned: tuple[int, ...] = ()
    length: Length = 0
    channels: int = 3
    dtype: Any = jnp.float32

    codebooks = (Codebook("codebook"),)
    adjustable = ("length",)
    no_decay = ("queries", "after_mistake", "register_positions", "mask", "code_positions", "decoder_positions", "codebook")
    last_layer = "to_pixels/kernel"
    generative = False

    def __post_init__(self):
        if self.registers % self.group or self.single % self.group or not self.single <= self.registers > 1:
            raise ValueError(
                f"tokenizer.group is {self.group}; tokenizer.registers, {self.registers}, and tokenizer.single, {self.single}, "
                "must be whole groups, and these no more than those"
            )
        if self.size[0] != self.size[1]:
            raise ValueError(f"tokenizer.size is {self.size}; it must be a square, of which codes tell the side")
        if len(self.aligned) not in (0, 2):
            raise ValueError(f"tokenizer.aligned is {self.aligned}; it must be a hidden width and a width, or ()")
        cells(self.size, (self.cell, self.cell))
        finite("tokenizer.power", self.power, 0)
        super().__post_init__()

    @property
    def code_sizes(self) -> tuple[int, ...]:
        return (self.codes,)

    @property
    def ends(self) -> tuple[int, ...]:
        """Numbers of codes that make an image, rising."""
        return (*range(1, self.single + 1), *range(self.single + self.group, self.registers + 1, self.group))

    @property
    def spec(self) -> TokenSpec:
        """The groups are rows of a grid."""
        places = grid(self.registers // self.group, self.group)
        return TokenSpec(places[: self.length or self.registers], codes=self.code_sizes, placed=False)

    @property
    def places(self) -> int:
        """Rows of the whole image's patches, and columns."""
        return self.size[0] // self.cell

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Sides in pixels of what each of `ends` tells."""
        side, n = self.size[0], self.registers
        lack = (side - 1) / (n - 1) ** self.power
        return tuple(min(max(int(side - lack * (n - t) ** self.power), 1), side) for t in self.ends)

    @property
    def drawn(self) -> tuple[int, ...]:
        """Rows of patches that the decoder makes of each of `ends`: those that hold its resolution."""
        return tuple(math.ceil(side / self.cell) for side in self.resolutions)

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        return self.encoder.rules

    def init_params(self, key: PRNGKey) -> Params:
        image = jnp.zeros((1, *self.size, self.channels))
        return self.init(key, image, key=key, method="autoencode")["params"]

    def setup(self):
        def dense(features, out_dtype=None):
            return Linear(features, self.dtype, out_dtype, xavier, bias=True)

        n, inside, outside = self.registers, self.encoder.width, self.decoder.width
        side = self.table or self.places
        self.patches = PatchRows(inside, self.cell, side, self.dtype)
        self.to_code = dense(self.code_features, jnp.float32)
        self.queries, self.register_positions, self.after_mistake = (
            self.param(name, table_init(inside), (n, inside)) for name in ("queries", "register_positions", "after_mistake")
        )
        self.mistaken = dense(inside)
        self.codebook = self.param("codebook", codebook_init(True), (self.codes, self.code_features))
        self.from_code, self.to_pixels = dense(outside), dense(self.channels * self.cell**2, jnp.float32)
        self.mask = self.param("mask", table_init(outside), (1, outside))
        self.decoder_positions = self.param("decoder_positions", table_init(outside), (side, side, outside))
        self.code_positions = self.param("code_positions", table_init(outside), (n, outside))
        if self.aligned:
            hidden, features = self.aligned
            self.told1, self.told2, self.told3 = dense(hidden), dense(hidden), dense(features, jnp.float32)

    @typed
    def embed(self, tokens: Tokens) -> Float[Array, "b n c"]:
        """The normalised codes of tokens; vectors in their place stay as they are."""
        return look_up(normalise(self.codebook), tokens)

    def latents(self, image: Float[Array, "b H W c"]) -> Float[Array, "b n c2"]:
        """What the quantiser sees, before it is normalised, of the first `length` registers."""
        return self.to_code(self.registered(self.seen(image), self.queries))[:, : self.spec.n]

    def quantise(self, latents: Float[Array, "*b c"]) -> tuple[Float[Array, "*b c"], Int[Array, "*b"], Metrics]:
        return vector_quantise(normalise(latents), normalise(self.codebook), self.vq)

    @typed
    def seen(self, image: Float[Array, "b H W c"]) -> Float[Array, "b p d"]:
        """Rows of the patches of images in [-1, 1], with their places."""
        rows = self.patches(image)
        return rows.reshape(len(rows), -1, self.encoder.width)

    @typed
    def registered(
        self, patches: Float[Array, "b p d"], queries: Float[Array, "n d"] | Float[Array, "b n d"]
    ) -> Float[Array, "b n d"]:
        """What all registers know, which begin as `queries`: of the patches, and of the registers of the same step or before."""
        rows = queries + self.register_positions
        rows = jnp.broadcast_to(rows, (len(patches), *rows.shape[-2:])).astype(patches.dtype)
        rows = self.encoder(jnp.concatenate([patches, rows], axis=1), self.steps_of_rows)
        return rows[:, patches.shape[1] :]

    @property
    def steps_of_rows(self) -> np.ndarray:
        """Of the encoder's rows: patches see patches, registers also those that are drawn before them and with them."""
        slot = np.arange(self.registers)
        step = np.where(slot < self.single, slot, self.single + (slot - self.single) // self.group)
        return np.concatenate([np.zeros(self.places**2), 1 + step]).astype(np.int32)

    @typed
    def mistake(
        self, image: Float[Array, "b H W c"], begin: Int[Array, "b"], neighbour: Int[Array, "b n"]
    ) -> tuple[Float[Array, "b n c2"], Float[Array, "b n c2"], Float[Array, "b n c2"], Int[Array, "b n 3"], Metrics]:
        """Two passes of the encoder: plainly, and going on after a mistake.

        Args:
          image: in [-1, 1].
          begin: first code of the mistake, which is one code of the `single` ones or a whole group; n makes none.
          neighbour: a code of the mistake is the so manieth of those near to its latent, counted from 0.

        Returns:
          Latents of the plain pass; its codes; codes up to the mistake, without gradient, and those that follow it; the
          numbers of the plain codes, of those with the mistake, and of what would have been right there; and the weighted
          losses of the quantiser, means over all that was quantised.
        """
        patches, book, slot = self.seen(image), normalise(self.codebook), np.arange(self.registers)
        latents = self.to_code(self.registered(patches, self.queries))
        codes, index, plain = self.quantise(latents)
        end = begin + jnp.where(begin < self.single, 1, self.group)
        known = slot < end[:, None]
        wrong = jnp.where(
            known & (slot >= begin[:, None]), self._neighbours(normalise(latents), book, begin, neighbour), index
        )
        given = lax.stop_gradient(book[wrong])
        queries = jnp.where(known[..., None], self.mistaken(given), self.after_mistake)
        others = self.to_code(self.registered(patches, queries))
        again, follows, _ = self.quantise(others)
        # the entropy, if it has a weight, is that of the plain pass
        parts = ((latents, index, jnp.ones_like(index)), (others, follows, 1 - known))
        losses = plain | {
            "codebook": self.vq.codebook * _mean(lambda z, i: book[i] - lax.stop_gradient(z), parts),
            "commit": self.vq.commit * _mean(lambda z, i: lax.stop_gradient(book[i]) - z, parts),
        }
        again = jnp.where(known[..., None], given, again)
        tokens = jnp.stack([index, jnp.where(known, wrong, follows), jnp.where(known, index, follows)], axis=-1)
        return latents, codes, again, tokens, losses

    def _neighbours(self, z, book, begin, neighbour):
        """Numbers of codes [b n], right in the group that begins at `begin`."""
        last, slot = self.registers - 1, np.arange(self.registers)
        some = jnp.minimum(begin[:, None] + np.arange(self.group), last)
        at = jnp.take_along_axis(z, some[..., None], axis=1)
        near = lax.top_k(-distances(at, book), min(self.nearest, self.codes))[1]
        which = jnp.minimum(jnp.take_along_axis(neighbour, some, axis=1), near.shape[-1] - 1)
        chosen = jnp.take_along_axis(near, which[..., None], axis=-1)[..., 0]
        return jnp.take_along_axis(chosen, jnp.clip(slot - begin[:, None], 0, self.group - 1), axis=1)

    @typed
    def autoencode(
        self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None
    ) -> tuple[Float[Array, "B H W c"], Metrics, Metrics]:
        """One training pass; without a key one from all codes, without a mistake.

        Returns:
          The reconstructions, with a key those from codes with a mistake after the others; the weighted losses of the
          quantiser; and what training may want to look at: "latents" [b n c] before quantisation, "tokens" as of `encode`,
          "target", what the reconstructions are compared with, and "features" [b 1 1 f] if there are `aligned` ones.
        """
        if key is None:
            latents = self.to_code(self.registered(self.seen(image), self.queries))
            codes, index, losses = self.quantise(latents)
            count = jnp.full(len(image), self.registers)
            return self.shown(codes, count, None), losses, self._shows(latents, codes, index, image)
        less, where, which = jax.random.split(key, 3)
        uniform = shares.draw(jax.random.uniform, less, (len(image), 2))
        count = jnp.where(uniform[:, 0] < self.fewer, self.counts(uniform[:, 1]), self.registers)
        begin = self.begins(shares.draw(jax.random.uniform, where, (len(image),)), count)
        return self.trained(image, count, begin, self._draw(which, len(image)))

    def _draw(self, key, images):
        """Numbers of neighbours."""
        most = min(self.nearest, self.codes)
        return shares.draw(lambda key, shape: jax.random.randint(key, shape, 0, most), key, (images, self.registers))

    @typed
    def counts(self, uniform: Float[Array, "b"]) -> Int[Array, "b"]:
        """A number of codes, of 1 to all but a group, rounded up to whole groups, from uniform numbers."""
        count = 1 + (uniform * max(self.registers - self.group, 1)).astype(jnp.int32)
        return jnp.where(count > self.single, -(-count // self.group) * self.group, count)

    @typed
    def begins(self, uniform: Float[Array, "b"], count: Int[Array, "b"]) -> Int[Array, "b"]:
        """Where a mistake begins, from uniform numbers: before the last group of `count` codes, or anywhere if all are `single`;
        at n (none) if there is one code."""
        most = jnp.where(count > self.single, count - self.group, count)
        begin = jnp.minimum((uniform * most).astype(jnp.int32), jnp.maximum(most - 1, 0))
        begin = jnp.where(begin < self.single, begin, begin // self.group * self.group)
        return jnp.where(count > 1, begin, self.registers)

    @typed
    def trained(
        self,
        image: Float[Array, "b H W c"],
        count: Int[Array, "b"],
        begin: Int[Array, "b"],
        neighbour: Int[Array, "b n"],
    ) -> tuple[Float[Array, "B H W c"], Metrics, Metrics]:
        """`autoencode` with given numbers of codes and mistakes (see `mistake`)."""
        latents, codes, again, tokens, losses = self.mistake(image, begin, neighbour)
        again = jnp.where((begin < self.registers)[:, None, None], again, codes)
        at = self._at(count)
        target = self.enlarged(self.lowered(image, at), at)
        recon = self.shown(jnp.concatenate([codes, again]), jnp.concatenate([count, count]), None)
        return recon, losses, self._shows(latents, codes, tokens[..., 0], jnp.concatenate([target, target]))

    def _shows(self, latents, codes, index, target):
        n = self.spec.n
        seen = {"latents": latents[:, :n], "tokens": self.in_line(index)[:, :n], "target": target}
        if self.aligned:
            told = self.told3(nn.silu(self.told2(nn.silu(self.told1(codes[:, :1])))))
            seen["features"] = told[:, :, None]
        return seen

    @typed
    def corrected(
        self, image: Float[Array, "b H W c"], *, key: PRNGKey
    ) -> tuple[Int[Array, "b n 1"], Int[Array, "b n 1"]]:
        """Tokens with a mistake in each image, and what is to be predicted from them: as if it were right, then what follows."""
        where, which = jax.random.split(key)
        uniform = shares.draw(jax.random.uniform, where, (len(image),))
        begin = self.begins(uniform, jnp.full(len(image), self.registers))
        *_, tokens, _ = self.mistake(image, begin, self._draw(which, len(image)))
        return tokens[:, : self.spec.n, 1:2], tokens[:, : self.spec.n, 2:]

    def _at(self, count):
        """The last of `ends` that so many codes make; -1 for none."""
        return jnp.searchsorted(jnp.asarray(self.ends), count, side="right") - 1

    def shown(
        self, codes: Float[Array, "b n f"], count: Int[Array, "b"], key: PRNGKey | Key[Array, "b"] | None
    ) -> Float[Array, "b H W rgb"]:
        """Images of the first codes, as far as their groups are whole, enlarged; grey of none. `key` is unused."""
        at = self._at(count)
        images = self.enlarged(self.painted(codes, jnp.maximum(at, 0)), jnp.maximum(at, 0))
        return jnp.where((at >= 0)[:, None, None, None], images, 0.0)

    @typed
    def painted(self, codes: Float[Array, "b n f"], at: Int[Array, "b"]) -> Float[Array, "b H W rgb"]:
        """What the decoder makes of codes up to one of `ends`: the image lies in the upper left corner, as large as it is."""
        rows, count, side = jnp.asarray(self.drawn)[at], jnp.asarray(self.ends)[at], self.decoder_positions.shape[0]
        matrices = np.zeros((self.places + 1, self.places, side), np.float32)
        for i in self.drawn:
            matrices[i, :i] = smooth_matrix(i, side)
        matrices = jnp.asarray(matrices)[rows]
        positions = resized(jnp.asarray(self.decoder_positions)[None], matrices, matrices)
        masks = (self.mask + positions.reshape(len(codes), self.places**2, -1)).astype(self.dtype)
        inside = np.arange(self.places) < rows[:, None]
        drawn = (inside[:, :, None] & inside[:, None]).reshape(len(codes), -1)
        known = np.arange(self.registers) < count[:, None]
        told = self.from_code(codes) + self.code_positions.astype(self.dtype)
        y = jnp.concatenate([masks, told], axis=1)
        y = self.decoder(y, np.zeros(y.shape[1], np.int32), valid=jnp.concatenate([drawn, known], axis=1))
        return unpatchify(self.to_pixels(y[:, : masks.shape[1]]), (self.places, self.places), self.cell)

    @typed
    def lowered(self, image: Float[Array, "b H W c"], at: Int[Array, "b"]) -> Float[Array, "b H W c"]:
        """Images as the codes up to one of `ends` should show them, in the corner where `painted` puts them."""
        whole = self.size[0]
        matrices = np.zeros((len(self.ends), whole, whole), np.float32)
        for matrix, side, rows in zip(matrices, self.resolutions, self.drawn):
            larger = self.cell * rows
            grow = bicubic_matrix(larger, side) if larger > side else np.eye(side, dtype=np.float32)
            matrix[:larger] = grow @ (area_matrix(side, whole) if side < whole else np.eye(whole, dtype=np.float32))
        matrices = jnp.asarray(matrices)[at]
        return resized(image, matrices, matrices)

    @typed
    def enlarged(self, image: Float[Array, "b H W c"], at: Int[Array, "b"]) -> Float[Array, "b H W c"]:
        """The images of the corners, where `painted` puts them, at the whole size."""
        whole = self.size[0]
        matrices = np.zeros((self.places + 1, whole, whole), np.float32)
        for rows in self.drawn:
            side = self.cell * rows
            matrices[rows, :, :side] = bicubic_matrix(whole, side) if side < whole else np.eye(whole)
        matrices = jnp.asarray(matrices)[jnp.asarray(self.drawn)[at]]
        return resized(image, matrices, matrices)


@typed
def resized(
    image: Float[Array, "#b h w c"], rows: Float[Array, "#b H h"], columns: Float[Array, "#b W w"]
) -> Float[Array, "b2 H W c"]:
    """Both axes of maps, each by matrices of its own; float32. One map or matrix serves all."""
    x = jnp.einsum("bHh,bhwc->bHwc", rows, image.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    return jnp.einsum("bWw,bHwc->bHWc", columns, x, precision=lax.Precision.HIGHEST)


def _mean(apart, parts):
    """Mean square of what is between latents and codes, of every image over the places that count."""
    total = sum((jnp.square(apart(normalise(z), i)).mean(-1) * weight).sum(1) for z, i, weight in parts)
    return (total / sum(weight.sum(1) for _, _, weight in parts)).mean()
