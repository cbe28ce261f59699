"""Tiny models that draw: of one grid, of scales, of random sets, of the most confident; what tests of decoders share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from trees import random_params

from ar_jax.data import Info
from ar_jax.decode.guidance import Interval
from ar_jax.decode.sampling import Sampling
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import NextScale
from ar_jax.generators.masked import Masked
from ar_jax.generators.maskgit import MaskGIT
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.adaln import AdaLN
from ar_jax.nets.conditioning import Label
from ar_jax.nets.transformer import Transformer
from ar_jax.nets.vit import GPT, ViT
from ar_jax.orders import Confident, Shuffled, raster, scales
from ar_jax.tokenizers.residual_pyramid import ResidualPyramid
from ar_jax.tokenizers.vqgan import VQGAN

NET = {"features": 4, "mult": (1, 2), "res_blocks": 0, "codes": 16, "code_features": 4, "groups": 2}
GRID, RESIDUAL, HEAD = (
    VQGAN((8, 8), latent=4, **NET),
    ResidualPyramid((8, 8), scales=(1, 2, 4), **NET),
    Categorical(std=0.5),
)
MODELS = {  # tokenizer, generator, order
    "causal": (GRID, Causal(Transformer(1, 16, 2, hidden=24), Label(16), HEAD), raster),
    "scales": (RESIDUAL, Causal(AdaLN(1, 16, 2, hidden=24, gate=0.5), Label(16), HEAD, NextScale(channels=4)), scales),
    "masked": (GRID, Masked(ViT(1, 16, 2), ViT(1, 16, 2), Label(16), HEAD, buffer=2), Shuffled(5, 2)),
    "maskgit": (GRID, MaskGIT(GPT(1, 16, 2, rows=0), Label(16), HEAD), Confident(5)),
}
IMAGES = 3
LABELS = {"label": np.arange(IMAGES, dtype=np.int32) % 3}
KEYS = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(5)))(jnp.arange(IMAGES))


@functools.cache
def ready(name):
    """Tokenizer, generator, and parameters of both."""
    tokenizer, generator, _ = MODELS[name]
    generator = generator.complete(tokenizer.spec, Info(classes=3))
    return tokenizer, generator, random_params(generator, 0.3), random_params(tokenizer, 0.3)


def order_of(name):
    return MODELS[name][2](MODELS[name][0].spec, KEYS, IMAGES, 0)


def program(name, sampling=Sampling(Interval(1.5)), **more):
    """Parameters, and the jitted function of them and of `extra` that gives images, and an account."""
    tokenizer, generator, params, frozen = ready(name)

    @jax.jit
    def run(params, frozen, extra=None):
        return sampling.images(
            generator, tokenizer, params, frozen, LABELS, order_of(name), keys=KEYS, extra=extra, **more
        )  # fmt: skip

    return run, (params, frozen)
