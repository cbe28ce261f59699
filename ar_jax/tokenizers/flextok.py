"""FlexTok: 1 to n ordered codes of an image, and a rectified flow that paints it from as many of them as there are."""

import math
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ar_jax.heads.flow import draw_times
from ar_jax.machine import shares
from ar_jax.machine.sharding import Rules
from ar_jax.nets.fixed_norm import FixedNorm
from ar_jax.nets.linear import Linear
from ar_jax.nets.mlp import TimeEmbedding, xavier, zeros
from ar_jax.nets.positions import sine_quarters
from ar_jax.tokenizers.ordered import Length, Ordered, Registers, starts
from ar_jax.tokenizers.quantize_scalar import FSQ, bounded
from ar_jax.typing import (
    Array,
    Bool,
    Float,
    Having,
    Int,
    Key,
    Metrics,
    Params,
    PRNGKey,
    Share,
    Size,
    Steps,
    Tokens,
    typed,
)

TIME = 1000  # what times in [0, 1] are multiplied with before their sinusoids
PERIOD = 256.0  # base of these
KEPT = ("uniform", "powers", "rounded")


class FlexTok(Ordered):
    """Image to a line of codes, coarse to fine, and back from any number of its first ones. The defaults are d18-d28.

    Below it lies a continuous tokenizer, which is not trained: the encoder reads its tokens, and registers that see them all and
    the registers before become codes; the decoder moves its tokens from noise (time 1) to data (time 0), given the codes.

    Attributes:
      base: the tokenizer below (`KLVAE`, `Patches`), whose tokens have about unit variance. Training leaves its parameters
        alone: begin with its folder (`tokenizer.parts`).
      registers, length: see `Ordered`.
      encoder, decoder: of any widths that are multiples of 4.
      quantiser: of the registers.
      kept: how many codes the decoder is shown in training, the others hidden: any number alike ("uniform"), any power of two
        alike ("powers"), or any number, rounded up to a power of two ("rounded"); n at most.
      dropped: share of images in training whose codes are all hidden by another vector, for guidance.
      unrounded: share of images in training whose latents are not rounded.
      times: how times are drawn in training (see `heads.flow.draw_times`).
      steps: of decoding, all alike.
      guidance: weight of the codes; 1 does without, at half the cost.
      normalised: guidance adds only what is at right angles to the guided velocity (adaptive projected guidance,
        arXiv:2410.02416), and less of what it did in the step before.
      momentum, most: of normalised guidance: the part of the step before, and the largest norm of an image's difference.
      dtype: of the projections around the networks; the flow is float32.
    Source: FlexTok (arXiv:2502.13967).
    """

    base: Annotated[nn.Module, Having("grid", "encode", "decode")]
    registers: Registers = 256
    encoder: FixedNorm = FixedNorm(18, 1152, 18)
    decoder: FixedNorm = FixedNorm(28, 1792, 28, kinds=2)
    quantiser: FSQ = FSQ((8, 8, 8, 5, 5, 5))
    length: Length = 0
    kept: Literal["uniform", "powers", "rounded"] = "uniform"
    dropped: Share = 0.1
    unrounded: Share = 0.0
    times: Literal["uniform", "logit_normal"] = "logit_normal"
    steps: Steps = 20
    guidance: float = 7.5
    normalised: bool = True
    momentum: float = -0.5
    most: float = 2.5
    dtype: Any = jnp.float32

    adjustable = ("length", "steps", "guidance", "normalised", "momentum", "most")
    no_decay = ("encoder_positions", "decoder_positions", "register_positions", "queries", "hidden", "nothing")

    @property
    def size(self) -> Size:
        """Height and width of the images in pixels."""
        return self.base.size

    @property
    def channels(self) -> int:
        """Of the images."""
        return self.base.channels

    @property
    def code_sizes(self) -> tuple[int, ...]:
        return self.quantiser.codes

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        return (*self.base.rules, *self.encoder.rules)

    def init_params(self, key: PRNGKey) -> Params:
        image = jnp.zeros((1, *self.size, self.channels))
        own = self.init(key, image, method="autoencode")["params"]
        below = self.base.init_params(jax.random.fold_in(key, 1))
        return own | {"base": below} if below else own

    def setup(self):
        if not self.base.spec.channels:
            raise ValueError(f"tokenizer.base is {type(self.base).__name__}, whose tokens are codes already")
        if self.encoder.kinds or self.decoder.kinds != 2:
            raise ValueError(
                f"tokenizer.encoder.kinds is {self.encoder.kinds} and tokenizer.decoder.kinds {self.decoder.kinds}; they must "
                "be 0 and 2, the decoder's kinds are places and codes"
            )
        if self.kept not in KEPT:
            raise ValueError(f"tokenizer.kept is {self.kept!r}; it must be one of {', '.join(KEPT)}")

        def dense(features, out_dtype=None, init=xavier):
            return Linear(features, self.dtype, out_dtype, init, bias=True)

        def vectors(name, *shape):
            return self.param(name, nn.initializers.normal(shape[-1] ** -0.5), shape)

        def places(name, width):
            return self.param(name, lambda _, rows, columns: sine_quarters(rows, columns, width), *self.base.grid)

        self.patches, self.to_code = dense(self.encoder.width), dense(self.quantiser.features, jnp.float32)
        self.encoder_positions = places("encoder_positions", self.encoder.width)
        self.queries = vectors("queries", self.registers, self.encoder.width)
        width = self.decoder.width
        self.from_code, self.noisy = dense(width), dense(width)
        self.decoder_positions = places("decoder_positions", width)
        self.register_positions = vectors("register_positions", self.registers, width)
        self.hidden, self.nothing = vectors("hidden", width), vectors("nothing", width)
        self.time = TimeEmbedding(width, self.dtype, base=PERIOD)
        self.to_velocity = dense(self.base.spec.channels, jnp.float32, zeros)

    @typed
    def embed(self, tokens: Tokens) -> Float[Array, "b n c"]:
        """What tokens stand for; vectors in their place stay as they are."""
        return tokens if jnp.issubdtype(tokens.dtype, jnp.floating) else self.quantiser.look_up(tokens)

    def latents(self, image: Float[Array, "b H W c"]) -> Float[Array, "b n c2"]:
        """What the quantiser sees, of the first `length` registers."""
        return self.registered(self.below(image))[:, : self.spec.n]

    def below(self, image: Float[Array, "b H W c"], key: PRNGKey | None = None) -> Float[Array, "b m c2"]:
        """Tokens of the tokenizer below, drawn with a key where it draws; nothing there is trained."""
        return lax.stop_gradient(self.base.encode(image, key=key).astype(jnp.float32))

    @typed
    def registered(self, x: Float[Array, "b m c"]) -> Float[Array, "b n f"]:
        """What all registers know of tokens of the tokenizer below, as the quantiser sees it."""
        y = self.patches(x)
        y = y + lax.stop_gradient(self.encoder_positions).astype(y.dtype)
        queries = jnp.broadcast_to(self.queries, (len(y), *self.queries.shape)).astype(y.dtype)
        y = self.encoder(jnp.concatenate([y, queries], axis=1), self.steps_of_rows)
        return self.to_code(y[:, x.shape[1] :])

    @property
    def steps_of_rows(self) -> np.ndarray:
        """Of the encoder's rows: places see places, registers also those before."""
        return np.concatenate([np.zeros(self.base.spec.n, np.int32), 1 + np.arange(self.registers, dtype=np.int32)])

    def quantise(self, latents: Float[Array, "*b c"]) -> tuple[Float[Array, "*b c"], Int[Array, "*b k"], Metrics]:
        return self.quantiser(latents)

    @typed
    def autoencode(
        self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None
    ) -> tuple[None, Metrics, Metrics]:
        """One training pass: the flow at a drawn time, given a drawn number of codes.

        Returns:
          None, as no image is made; the loss "flow", the squared error of the velocity; and what training may want to look at:
          "latents" [b n c] before quantisation and "tokens" as of `encode`.
        """
        base, time, noise, kept, dropped, unrounded = jax.random.split(jax.random.key(0) if key is None else key, 6)
        x = self.below(image, base)
        latents = self.registered(x)
        codes, index, losses = self.quantise(latents)
        if self.unrounded:
            whole = self._draw(unrounded, len(x)) >= self.unrounded
            half = np.array(self.quantiser.levels) // 2
            codes = jnp.where(whole[:, None, None], codes, bounded(latents, self.quantiser.levels) / half)
        _, flow = self.flow(
            x, codes, draw_times(time, (len(x),), self.times), shares.draw(jax.random.normal, noise, x.shape),
            self._kept(self._draw(kept, len(x))), self._draw(dropped, len(x)) < self.dropped,
        )  # fmt: skip
        seen = {"latents": latents[:, : self.spec.n], "tokens": self.in_line(index)[:, : self.spec.n]}
        return None, losses | {"flow": flow}, seen

    def _draw(self, key, images):
        return shares.draw(jax.random.uniform, key, (images,))

    def _kept(self, uniform):
        """How many codes are shown, from uniform numbers."""
        n = self.registers
        if self.kept == "powers":
            powers = np.append(2 ** np.arange(math.ceil(math.log2(n))), n)
            return jnp.asarray(powers)[(uniform * len(powers)).astype(jnp.int32)]
        count = 1 + (uniform * n).astype(jnp.int32)
        if self.kept == "rounded":
            powers = 2 ** np.arange(math.ceil(math.log2(n)) + 1)
            return jnp.minimum(jnp.asarray(powers)[jnp.searchsorted(powers, count)], n)
        return count

    @typed
    def flow(
        self, x: Float[Array, "b m c"], codes: Float[Array, "b n f"], t: Float[Array, "b"], noise: Float[Array, "b m c"],
        count: Int[Array, "b"], nothing: Bool[Array, "b"],
    ) -> tuple[Float[Array, "b m c"], Float[Array, ""]]:  # fmt: skip
        """The velocity of tokens with so much noise, and its mean squared error."""
        at = t[:, None, None]
        found = self.velocity((1 - at) * x + at * noise, t, codes, count, nothing)
        return found, jnp.square(noise - x - found).mean()

    @typed
    def velocity(
        self, x: Float[Array, "b m c"], t: Float[Array, "b"], codes: Float[Array, "b n f"], count: Int[Array, "b"],
        nothing: Bool[Array, "b"],
    ) -> Float[Array, "b m c"]:  # fmt: skip
        """Noise less data, of tokens at times in [0, 1], float32.

        Args:
          x: noisy tokens of the tokenizer below.
          t: their time, 1 is noise.
          codes: of all registers.
          count: how many of them are known.
          nothing: images whose codes are hidden.
        """
        rows = self.from_code(codes)
        rows = rows + self.register_positions.astype(rows.dtype)
        rows = jnp.where((np.arange(self.registers) < count[:, None])[..., None], rows, self.hidden.astype(rows.dtype))
        rows = jnp.where(nothing[:, None, None], self.nothing.astype(rows.dtype), rows)
        y = self.noisy(x)
        y = y + lax.stop_gradient(self.decoder_positions).astype(y.dtype)
        mod = self.decoder.modulate(self.time(TIME * t))
        kind = np.repeat(np.arange(2, dtype=np.int32), (x.shape[1], self.registers))
        y = self.decoder(jnp.concatenate([y, rows], axis=1), np.zeros(len(kind), np.int32), mod=mod, kind=kind)
        return self.to_velocity(y[:, : x.shape[1]])

    def shown(
        self, codes: Float[Array, "b n f"], count: Int[Array, "b"], key: PRNGKey | Key[Array, "b"] | None
    ) -> Float[Array, "b H W rgb"]:
        noise = starts(key, len(codes), (self.base.spec.n, self.base.spec.channels))
        return self.base.decode(self.denoised(noise, codes, count))

    @typed
    def denoised(
        self, noise: Float[Array, "b m c"], codes: Float[Array, "b n f"], count: Int[Array, "b"]
    ) -> Float[Array, "b m c"]:
        """Tokens of the tokenizer below that the flow ends with, in one loop over `steps` equal steps."""
        ways = 1 if self.guidance == 1 else 2  # rows with and without codes are neighbours
        codes, count = (jnp.repeat(part, ways, axis=0) for part in (codes, count))
        nothing = jnp.arange(len(codes)) % ways == 1

        def step(self, carry, t):
            x, before = carry
            found = self.velocity(jnp.repeat(x, ways, axis=0), jnp.full(len(codes), t), codes, count, nothing)
            found, before = self._guided(found, before) if ways == 2 else (found, before)
            return (x - found / self.steps, before), None

        times = 1 - np.arange(self.steps, dtype=np.float32) / self.steps
        loop = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        (x, _), _ = loop(self, (noise, jnp.zeros_like(noise)), times)
        return x

    def _guided(self, found, before):
        """The guided velocity of pairs of rows, and the running difference."""
        known, unknown = found[0::2], found[1::2]
        if not self.normalised:
            return unknown + self.guidance * (known - unknown), before

        def inner(a, b):
            return (a * b).sum((1, 2), keepdims=True)

        before = known - unknown + self.momentum * before
        apart = before * jnp.minimum(1, self.most / jnp.sqrt(jnp.maximum(inner(before, before), 1e-24)))
        apart = apart - inner(apart, known) / jnp.maximum(inner(known, known), 1e-24) * known
        return known + (self.guidance - 1) * apart, before
