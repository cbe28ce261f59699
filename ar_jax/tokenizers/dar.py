"""D-AR's tokenizer: groups of codes, one for each step of a flow that paints pixels, so that a picture grows as they come."""

from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.machine import shares
from ar_jax.machine.sharding import Rules
from ar_jax.nets.adaln import modulated
from ar_jax.nets.head_norm import HeadNorm, Painter
from ar_jax.nets.linear import Linear
from ar_jax.nets.mlp import xavier, zeros
from ar_jax.nets.resize import resize
from ar_jax.tokenizers.continuous import cells, patchify, unpatchify
from ar_jax.tokenizers.ordered import Length, Ordered, Registers, starts
from ar_jax.tokenizers.quantize import Codebook, VectorLoss, codebook_init, look_up, normalise, vector_quantise
from ar_jax.tokens import Scale, grid, sides
from ar_jax.typing import Array, Float, Int, Key, Metrics, Params, PRNGKey, Size, Steps, Tokens, Within, finite, typed

TIME = 1000  # what times in [0, 1] are multiplied with before their sinusoids


class SequentialDiffusion(Ordered):
    """Image to a line of codes, and back by a flow over pixels from noise (time 0) to data (time 1), each of whose steps is
    told a group of them. The defaults are D-AR's.

    Attributes:
      size: height and width of the images in pixels, multiples of those of both cells.
      cell, brush: pixels that make a row of the encoder, and one of the painter: the side of a square, or (rows, columns).
      registers, length: see `Ordered`.
      steps: of the flow.
      group: codes that a step is told, the last ones if there are not as many behind those of its beginning.
      encoder: of patches and queries; queries see the patches and the queries before.
      decoder: of codes, each of which sees those before.
      painter: of noisy patches.
      codes: size of the codebook.
      code_features: width of a code; latents and codes are normalised, so search is by cosine.
      rank: width of the queries' table, whose rows are projected to the encoder's width; 0 is that width itself.
      rows: of the queries' and of the decoder's table, of which the first are used; 0 is as many as `registers`.
      vq: weights of the quantiser's losses, over the codes up to those of the drawn step; entropy, if any, over all.
      spread: standard deviation of the data; images are multiplied by it.
      delay: how much later times are than evenly spread ones u, as u / (u + delay (1 - u)).
      aligned: layer, hidden width and width of features of the painter that a teacher may look at ("features", on the encoder's
        grid): rows before that layer through a perceptron; () is none.
      channels: of the image.
      dtype: of the projections around the networks; quantiser and flow are float32.
    Source: D-AR (arXiv:2505.23660).
    """

    size: Size = (256, 256)
    cell: Scale = 16
    brush: Scale = 8
    registers: Registers = 256
    encoder: HeadNorm = HeadNorm(8, 768, 12)
    decoder: HeadNorm = HeadNorm(8, 768, 12)
    painter: Painter = Painter(12, 768, 12)
    codes: int = 16384
    code_features: int = 8
    steps: Steps = 8
    group: Registers = 32
    length: Length = 0
    rank: Annotated[int, Within(0, 2**16)] = 8
    rows: Length = 0
    vq: VectorLoss = VectorLoss()
    spread: float = 0.6
    delay: float = 2.0
    aligned: tuple[int, ...] = ()
    channels: int = 3
    dtype: Any = jnp.float32

    codebooks = (Codebook("codebook"),)
    adjustable = ("length",)
    no_decay = ("queries", "positions", "codebook")

    def __post_init__(self):
        if self.group > self.registers or self.steps > self.registers:
            raise ValueError(
                f"tokenizer.group is {self.group} and tokenizer.steps {self.steps}; neither may be above the "
                f"{self.registers} registers"
            )
        if self.rows and self.rows < self.registers:
            raise ValueError(f"tokenizer.rows is {self.rows}; it must be at least the {self.registers} registers, or 0")
        if self.aligned and (len(self.aligned) != 3 or not 0 <= self.aligned[0] < self.painter.layers):
            raise ValueError(
                f"tokenizer.aligned is {self.aligned}; it must be a layer of the painter's {self.painter.layers}, a hidden width "
                "and a width, or ()"
            )
        for cell in (self.cell, self.brush):
            cells(self.size, sides(cell))
        for name in ("spread", "delay"):
            finite(f"tokenizer.{name}", getattr(self, name), 1e-6)
        super().__post_init__()

    @property
    def code_sizes(self) -> tuple[int, ...]:
        return (self.codes,)

    @property
    def begins(self) -> np.ndarray:
        """First code that each step is told, int32 [steps]."""
        return np.minimum(np.arange(self.steps) * self.registers // self.steps, self.registers - self.group).astype(
            np.int32
        )

    @property
    def ends(self) -> tuple[int, ...]:
        """Numbers of codes that one step more can be told."""
        return tuple(sorted({int(begin) + self.group for begin in self.begins} | {self.registers}))

    @property
    def places(self) -> tuple[int, int]:
        """Rows and columns of the encoder's patches."""
        return cells(self.size, sides(self.cell))

    @property
    def canvas(self) -> tuple[int, int]:
        """Rows and columns of the painter's patches."""
        return cells(self.size, sides(self.brush))

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        return self.painter.rules

    def init_params(self, key: PRNGKey) -> Params:
        return self.init(key, jnp.zeros((1, *self.size, self.channels)), method="autoencode")["params"]

    def setup(self):
        def dense(features, out_dtype=None, init=xavier, bias=True):
            return Linear(features, self.dtype, out_dtype, init, bias=bias)

        def table(name, width):
            return self.param(name, nn.initializers.normal(width**-0.5), (self.rows or self.registers, width))

        self.patches, self.noisy = dense(self.encoder.width), dense(self.painter.width)
        self.queries = table("queries", self.rank or self.encoder.width)
        if self.rank:
            self.query = dense(self.encoder.width)
        self.to_code = dense(self.code_features, jnp.float32, bias=False)
        self.codebook = self.param("codebook", codebook_init(True), (self.codes, self.code_features))
        self.from_code = dense(self.decoder.width, bias=False)
        self.positions = table("positions", self.decoder.width)
        height, width = sides(self.brush)
        self.to_velocity = dense(self.channels * height * width, jnp.float32, zeros)
        if self.aligned:
            _, hidden, features = self.aligned
            self.aligned1, self.aligned2, self.aligned3 = dense(hidden), dense(hidden), dense(features, jnp.float32)

    @typed
    def embed(self, tokens: Tokens) -> Float[Array, "b n c"]:
        """The normalised codes of tokens; vectors in their place stay as they are."""
        return look_up(normalise(self.codebook), tokens)

    def latents(self, image: Float[Array, "b H W c"]) -> Float[Array, "b n c2"]:
        """What the quantiser sees, before it is normalised, of the first `length` registers."""
        return self.registered(image)[:, : self.spec.n]

    @typed
    def registered(self, image: Float[Array, "b H W c"]) -> Float[Array, "b n f"]:
        """What all registers know of images in [-1, 1]."""
        x = modulated(self.patches(patchify(image, self.cell)), 0, 0, self.encoder.eps)
        queries = jnp.asarray(self.queries)[: self.registers]
        queries = self.query(queries) if self.rank else queries.astype(x.dtype)
        places = grid(*self.places)
        steps = np.concatenate([np.zeros(len(places)), 1 + np.arange(self.registers)]).astype(np.int32)
        coords = np.concatenate([places, np.zeros((self.registers, 3), np.int32)])
        y = jnp.concatenate([x, jnp.broadcast_to(queries, (len(x), *queries.shape))], axis=1)
        return self.to_code(self.encoder(y, steps, coords)[:, len(places) :])

    def quantise(self, latents: Float[Array, "*b c"]) -> tuple[Float[Array, "*b c"], Int[Array, "*b"], Metrics]:
        return vector_quantise(normalise(latents), normalise(self.codebook), self.vq)

    @typed
    def told(self, codes: Float[Array, "b n c"]) -> Float[Array, "b n d"]:
        """What the painter is told by all codes, of each by those up to it."""
        y = self.from_code(codes)
        y = y + jnp.asarray(self.positions)[: self.registers].astype(y.dtype)
        return self.decoder(y, np.arange(self.registers, dtype=np.int32))

    def late(self, u: Array) -> Array:
        """The time of an evenly spread number in [0, 1]."""
        return u / (u + self.delay * (1 - u))

    @typed
    def autoencode(
        self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None
    ) -> tuple[Float[Array, "b H W c"], Metrics, Metrics]:
        """One training pass: the flow at a drawn time, told the codes of its step.

        Returns:
          The estimate of the image by one step from there; the weighted losses of the quantiser and "flow", the squared error of
          the velocity in units of the data's variance; and what training may want to look at: "latents" [b n c] before
          quantisation, "tokens" as of `encode`, and "features" [b h w f] if there are `aligned` ones.
        """
        time, noise = jax.random.split(jax.random.key(0) if key is None else key)
        u = shares.draw(jax.random.uniform, time, (len(image),))
        return self.trained(image, u, shares.draw(jax.random.normal, noise, image.shape))

    @typed
    def trained(
        self, image: Float[Array, "b H W c"], u: Float[Array, "b"], noise: Float[Array, "b H W c"]
    ) -> tuple[Float[Array, "b H W c"], Metrics, Metrics]:
        """`autoencode` with evenly spread numbers in [0, 1), from which times come, and noise that are given."""
        latents = self.registered(image)
        codes, index, plain = self.quantise(latents)
        step = jnp.minimum(jnp.floor(self.steps * u + 0.5).astype(jnp.int32), self.steps - 1)
        begin = jnp.asarray(self.begins)[step]
        losses = plain | self._losses(normalise(latents), normalise(self.codebook)[index], begin + self.group)

        target, t = self.spread * image, self.late(u)
        at = t[:, None, None, None]
        noisy = at * target + (1 - at) * noise
        found, before = self.velocity(noisy, t, self._of_step(self.told(codes), begin))
        losses["flow"] = jnp.square(target - noise - found).mean() / self.spread**2
        n = self.spec.n
        seen = {"latents": latents[:, :n], "tokens": self.in_line(index)[:, :n]}
        if self.aligned:
            y = before[self.aligned[0]]
            y = resize(y.reshape(len(y), *self.canvas, -1), self.places, "area")
            seen["features"] = self.aligned3(nn.silu(self.aligned2(nn.silu(self.aligned1(y)))))
        return (noisy + (1 - at) * found) / self.spread, losses, seen

    def _losses(self, z, code, end):
        """Those of the quantiser, means over the codes before `end` of each image."""
        weight = (np.arange(self.registers) < end[:, None]).astype(jnp.float32)
        mean = lambda x: (jnp.square(x).mean(-1) * weight).sum() / weight.sum()  # noqa: E731
        still = jax.lax.stop_gradient
        return {
            "codebook": self.vq.codebook * mean(code - still(z)),
            "commit": self.vq.commit * mean(still(code) - z),
        }

    def _of_step(self, told, begin):
        """The rows [b group d] from `begin` on of each image."""
        return jax.vmap(lambda rows, first: jax.lax.dynamic_slice_in_dim(rows, first, self.group))(told, begin)

    @typed
    def velocity(
        self, x: Float[Array, "b H W c"], t: Float[Array, "b"], told: Float[Array, "b m d"]
    ) -> tuple[Float[Array, "b H W c"], Float[Array, "l b q d2"]]:
        """Data less noise, of images at times in [0, 1], float32; and the rows that come into each layer of the painter."""
        y, before = self.painter(self.noisy(patchify(x, self.brush)), TIME * t, told, grid(*self.canvas))
        return unpatchify(self.to_velocity(y), self.canvas, self.brush), before

    def shown(
        self, codes: Float[Array, "b n c"], count: Int[Array, "b"], key: PRNGKey | Key[Array, "b"] | None
    ) -> Float[Array, "b H W rgb"]:
        return self.painted(starts(key, len(codes), (*self.size, self.channels)), codes, count)

    @typed
    def painted(
        self, noise: Float[Array, "b H W c"], codes: Float[Array, "b n f"], count: Int[Array, "b"]
    ) -> Float[Array, "b H W c"]:
        """Images of the first `count` codes; grey where these are fewer than one step needs.

        The flow is followed by Adams and Bashforth's method of second order, as for steps of one length, in one loop; the last
        step of which the codes are known goes to the end.
        """
        told, begins = self.told(codes), self.begins
        known = (begins + self.group <= count[:, None]).sum(1)  # steps
        times = np.append(self.late(np.arange(self.steps) / self.steps), 1).astype(np.float32)

        def step(self, carry, at):
            x, before = carry
            i, begin, now, then = at
            found, _ = self.velocity(x, jnp.full(len(x), now), self._of_step(told, jnp.full(len(x), begin)))
            length = jnp.where(i < known, jnp.where(i + 1 == known, 1, then) - now, 0)
            slope = jnp.where(i == 0, found, 1.5 * found - 0.5 * before)
            return (x + length[:, None, None, None] * slope, found), None

        loop = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        each = (np.arange(self.steps), begins, times[:-1], times[1:])
        (x, _), _ = loop(self, (noise, jnp.zeros_like(noise)), jax.tree.map(jnp.asarray, each))
        return jnp.where((known > 0)[:, None, None, None], x / self.spread, 0.0)
