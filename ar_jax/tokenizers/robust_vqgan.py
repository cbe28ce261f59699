"""A VQGAN that is trained to decode tokens which are a little wrong, as a generator draws them."""

import jax
import jax.numpy as jnp

from ar_jax.tokenizers.quantize import normalise
from ar_jax.tokenizers.quantize_perturbed import annealed, perturb
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.typing import Array, Float, Index, Layers, Many, Metrics, PRNGKey, Share, typed


class RobustVQGAN(VQGAN):
    """As `VQGAN`, but in training some images are decoded from neighbours of their codes, less and less far away.

    The published network is a pair of pretrained transformers (DINOv2); here it is the VQGAN's [ours]. The perturbation and
    its plan are the published ones.

    Attributes:
      alpha: probability at the start that a token of these images is replaced.
      beta: share of images.
      delta: at the start a token is replaced by one of so many nearest codes.
      start, end: updates between which alpha and delta shrink, on a straight line; published are epochs 40 and 120 of 200.
      least: what of both is left from then on.
      others: see `VQGAN`.
    Source: RobustTok (arXiv:2503.08354).
    """

    alpha: Share = 1.0
    beta: Share = 0.1
    delta: Layers = 100
    start: Many = 50_000
    end: Many = 150_000
    least: Share = 0.5

    stepped = True

    @typed
    def autoencode(
        self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None, step: Index = 0
    ) -> tuple[Float[Array, "b H W c"], Metrics, Metrics]:
        """One training pass; with a key, some images are perturbed, as the plan has it at update `step`.

        Returns:
          As of `VQGAN`.
        Raises:
          ValueError: the plan ends before it starts, or asks for more neighbours than there are codes.
        """
        if self.end <= self.start:
            raise ValueError(f"tokenizer.end is {self.end}; the plan must end after tokenizer.start, {self.start}")
        if self.delta > self.codes:
            raise ValueError(f"tokenizer.delta is {self.delta}, but there are {self.codes} codes; give at most as many")
        latents = self.latents(image)
        codes, index, losses = self.quantise(latents)
        if key is not None:
            codes = self.perturbed(latents, codes, key, step)
        return self.pixels(codes), losses, {"latents": latents, "tokens": self.in_line(index)}

    def perturbed(self, latents: Array, codes: Array, key: PRNGKey, step: Index) -> Float[Array, "b h w c"]:
        """Codes of which those of the first images are perturbed, by the plan at an update."""
        ratio = annealed(jnp.asarray(step, jnp.float32), self.start, self.end, self.least)
        delta = jnp.maximum((ratio * self.delta).astype(jnp.int32), 1)
        some, which = jax.random.split(key)
        uniform = jax.random.uniform(some, latents.shape[:-1])
        neighbour = jax.random.randint(which, latents.shape[:-1], 0, delta)
        z = latents.astype(jnp.float32)
        z = normalise(z) if self.l2_norm else z
        return perturb(z, codes, self._codes(), uniform, neighbour, ratio * self.alpha, self.beta, self.delta)
