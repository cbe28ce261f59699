"""Layton: a few codes of a small image, and a latent diffusion that makes a large one of them, in one step or two."""

import dataclasses
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ar_jax.machine import shares
from ar_jax.machine.sharding import Rules
from ar_jax.nets.denoiser import Denoiser
from ar_jax.nets.resize import resize
from ar_jax.tokenizers.ordered import image_keys, starts
from ar_jax.tokenizers.quantised import Quantised
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Float, Having, Int, Key, Metrics, Params, PRNGKey, Size, Steps, Tokens, Within, typed

TIMES = 1000
TIME = 10.0  # what times are multiplied with in the parts of `consistent_parts`


class ConsistencyDecoder(Quantised):
    """Image to the codes of another tokenizer, which sees it small, and back by a diffusion over the latents of a third.

    It is trained twice: first to tell the noise in latents; then, with `consistent`, to tell from any time what it tells from a time
    that is `jump` earlier, which a teacher leads to, and so the image itself.

    Attributes:
      base: the tokenizer below (`KLVAE`, `Patches`), whose tokens have about unit variance. It is not trained: begin with its folder
        (`tokenizer.parts`).
      reader: a tokenizer of codes, of images of any size (`VQGAN`, `ViTVQGAN`); what makes pixels of them is not used.
      denoiser: tells the noise.
      consistent: the second training. Begin it with the first (`tokenizer.start`), and the teacher as the denoiser (`tokenizer.alike`).
      steps: of decoding: 1 or 2 with `consistent`, else more, without fresh noise (DDIM).
      jump: between the times that must agree, of 1,000.
      sharp: below this distance the error of the consistency is squared, above it absolute (pseudo-Huber).
      sigma: how early in time the latents themselves are what is told.
    Source: Layton (arXiv:2503.08377) gives the aim; latent consistency (arXiv:2310.04378) the second training. Sizes, schedule and
      weights are a proposal.
    """

    base: Annotated[nn.Module, Having("grid", "encode", "decode")]
    reader: Annotated[nn.Module, Having("latents", "quantise", "embed")]
    denoiser: Denoiser = Denoiser(24, 1024, 16)
    consistent: bool = False
    steps: Steps = 1
    jump: Annotated[int, Within(1, TIMES - 1)] = 20
    sharp: Annotated[float, Within(1e-9, 1e3)] = 1e-3
    sigma: Annotated[float, Within(1e-6, 1e6)] = 0.5

    generative = True
    adjustable = ("steps",)

    @property
    def size(self) -> Size:
        """Height and width of the images in pixels."""
        return self.base.size

    @property
    def channels(self) -> int:
        """Of the images."""
        return self.reader.channels

    @property
    def grid(self) -> tuple[int, ...]:
        """The shape of the codes."""
        return self.reader.grid

    @property
    def spec(self) -> TokenSpec:
        return dataclasses.replace(self.reader.spec, placed=False)

    @property
    def codebooks(self) -> tuple:
        """Those of the reader."""
        books = getattr(self.reader, "codebooks", ())
        return tuple(dataclasses.replace(book, path=f"reader/{book.path}") for book in books)

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        return (*self.base.rules, *self.reader.rules, *self.denoiser.rules)

    def init_params(self, key: PRNGKey) -> Params:
        image = jnp.zeros((1, *self.size, self.channels))
        own = self.init(key, image, method="autoencode")["params"]
        whole = {
            name: part.init_params(jax.random.fold_in(key, i))
            for i, (name, part) in enumerate((("base", self.base), ("reader", self.reader)), 1)
        }
        return own | {name: params for name, params in whole.items() if params}

    def setup(self):
        if not self.base.spec.channels:
            raise ValueError(f"tokenizer.base is {type(self.base).__name__}, whose tokens are codes already")
        if not self.reader.spec.codes:
            raise ValueError(f"tokenizer.reader is {type(self.reader).__name__}, whose tokens are continuous; give one of codes")
        if self.consistent:
            self.teacher = self.denoiser.clone()

    @typed
    def embed(self, tokens: Tokens) -> Float[Array, "b n c"]:
        """What tokens stand for, as the reader says."""
        return self.reader.embed(tokens)

    def latents(self, image: Float[Array, "b H W c"]) -> Array:
        """What the reader's quantiser sees."""
        return self.reader.latents(resize(image, self.reader.size, "area"))

    def quantise(self, latents: Array) -> tuple[Array, Array, Metrics]:
        return self.reader.quantise(latents)

    def below(self, image: Float[Array, "b H W c"], key: PRNGKey | None = None) -> Float[Array, "b m c2"]:
        """Tokens of the tokenizer below, drawn with a key where it draws; nothing there is trained."""
        return lax.stop_gradient(self.base.encode(image, key=key).astype(jnp.float32))

    @typed
    def decode(self, tokens: Tokens, *, key: PRNGKey | Key[Array, "b"] | None = None) -> Float[Array, "b H W rgb"]:
        """Images, about [-1, 1] but not clipped.

        Args:
          key: of the noise that images start from, one for all images or one for each; None always takes the same.
        """
        return self.base.decode(self.denoised(self.embed(tokens), key))

    @typed
    def autoencode(
        self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None
    ) -> tuple[Float[Array, "b H W rgb"] | None, Metrics, Metrics]:
        """One training pass, at a drawn time.

        Returns:
          The image that is told there, or None in the first training, which makes none; the losses of the reader and "noise", the
          squared error of the noise, or "consistency"; and "latents" and "tokens" as of `Quantised`.
        """
        base, time, noise = jax.random.split(jax.random.key(0) if key is None else key, 3)
        x, latents = self.below(image, base), self.latents(image)
        codes, index, losses = self.quantise(latents)
        codes = codes.reshape(len(codes), -1, codes.shape[-1])
        noise = shares.draw(jax.random.normal, noise, x.shape)
        u = shares.draw(jax.random.uniform, time, (len(x),))
        seen = {"latents": latents, "tokens": self.in_line(index)}
        if not self.consistent:
            t = jnp.floor(u * TIMES).astype(jnp.int32)
            found = self.noise(noised(x, noise, t), t, codes)
            return None, losses | {"noise": jnp.square(found - noise).mean()}, seen
        t = 1 + jnp.floor(u * (TIMES - 1)).astype(jnp.int32)
        told, losses["consistency"] = self.agreement(noised(x, noise, t), t, codes)
        return self.base.decode(told), losses, seen

    def noise(self, x: Float[Array, "b m c"], t: Int[Array, "b"], codes: Float[Array, "b n f"]) -> Float[Array, "b m c"]:
        return self.denoiser(x, t.astype(jnp.float32), codes, self.base.grid)

    @typed
    def told(
        self, x: Float[Array, "b m c"], t: Int[Array, "b"], codes: Float[Array, "b n f"]
    ) -> Float[Array, "b m c"]:
        """Latents without noise; with `consistent`, at time 0 those that are given."""
        clean = cleaned(x, self.noise(x, t, codes), t)
        if not self.consistent:
            return clean
        skip, out = consistent_parts(t, self.sigma)
        return skip * x + out * clean

    @typed
    def agreement(
        self, x: Float[Array, "b m c"], t: Int[Array, "b"], codes: Float[Array, "b n f"]
    ) -> tuple[Float[Array, "b m c"], Float[Array, ""]]:
        """What is told at times, and how far that is from what is told where the teacher leads to; only the former is trained."""
        earlier = jnp.maximum(t - self.jump, 0)
        teacher = self.teacher(x, t.astype(jnp.float32), codes, self.base.grid)
        there = noised(cleaned(x, teacher, t), teacher, earlier)
        now, want = self.told(x, t, codes), lax.stop_gradient(self.told(lax.stop_gradient(there), earlier, codes))
        return now, (jnp.sqrt(jnp.square(now - want) + self.sharp**2) - self.sharp).mean()

    @typed
    def denoised(
        self, codes: Float[Array, "b n f"], key: PRNGKey | Key[Array, "b"] | None = None
    ) -> Float[Array, "b m c"]:
        """Tokens of the tokenizer below, drawn in one loop over `steps` times."""
        b, shape = len(codes), (self.base.spec.n, self.base.spec.channels)
        keys = image_keys(key, b)
        times = visited(self.steps)

        def step(self, x, each):
            i, t, kept = each
            t = jnp.full(b, t)
            clean = self.told(x, t, codes)
            if self.consistent:
                noise = starts(jax.vmap(lambda key: jax.random.fold_in(key, i))(keys), b, shape)
            else:
                noise = (x - jnp.sqrt(kept_at(t)) * clean) / jnp.sqrt(1 - kept_at(t))
            return jnp.sqrt(kept) * clean + jnp.sqrt(1 - kept) * noise, None

        loop = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        after = np.append(kept_table()[times[1:]], 1).astype(np.float32)
        each = (np.arange(1, self.steps + 1), times, after)
        return loop(self, starts(keys, b, shape), jax.tree.map(jnp.asarray, each))[0]


def kept_table() -> np.ndarray:
    """Part of the variance that is of the latents at times 0..999, float32: that of Stable Diffusion (arXiv:2112.10752)."""
    beta = np.linspace(0.00085**0.5, 0.012**0.5, TIMES) ** 2
    return np.cumprod(1 - beta).astype(np.float32)


def kept_at(t: Int[Array, "b"]) -> Float[Array, "b 1 1"]:
    return jnp.asarray(kept_table())[t][:, None, None]


def noised(x: Float[Array, "b m c"], noise: Float[Array, "b m c"], t: Int[Array, "b"]) -> Float[Array, "b m c"]:
    return jnp.sqrt(kept_at(t)) * x + jnp.sqrt(1 - kept_at(t)) * noise


def cleaned(x: Float[Array, "b m c"], noise: Float[Array, "b m c"], t: Int[Array, "b"]) -> Float[Array, "b m c"]:
    """The inverse of `noised`."""
    return (x - jnp.sqrt(1 - kept_at(t)) * noise) / jnp.sqrt(kept_at(t))


def consistent_parts(t: Int[Array, "b"], sigma: float) -> tuple[Float[Array, "b 1 1"], Float[Array, "b 1 1"]]:
    """How much of what is given and of what is found makes what is told at times: all of the former at 0."""
    late = TIME * t.astype(jnp.float32)[:, None, None]
    return sigma**2 / (late**2 + sigma**2), late / jnp.sqrt(late**2 + sigma**2)


def visited(steps: int) -> np.ndarray:
    """Times of decoding, int32 [steps]: the last, and evenly down."""
    if steps > TIMES:
        raise ValueError(f"tokenizer.steps is {steps}; there are {TIMES} times")
    return (TIMES - np.arange(steps) * TIMES // steps - 1).astype(np.int32)
