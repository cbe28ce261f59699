r"""Layton: a few codes of a small image, which a latent diffusion turns into a large one in one step or two (arXiv:2503.08377).

    python train.py configs/layton.py:VARIANT
    python sample.py runs/mnist5k_layton

What ran here: configs/README.md.

Small, for two CPU cores, the second on the first:

    mnist5k_noise    5,000 real digits, the first training: 8x8 codes of 16x16 pixels tell the noise in 32x32
    mnist5k          the second training; LlamaGen's transformer

Images of 1024 pixels by 256 codes of images of 256; of the tokenizers 156M are those of the two below:

    variant          parameters   what                                             published
    vae              84M          the autoencoder below, of 256 pixels             none
    noise            978M         the first training, in latents of 64x64          none
    consistency      1.8B         the second, with the teacher; of 1 or 2 steps    none
    xl_t2i           778M         captions, LlamaGen's transformer                 none

The whole way:

    python train.py configs/llamagen.py:vq16
    python train.py configs/layton.py:vae
    python train.py configs/layton.py:noise
    python train.py configs/layton.py:consistency
    python train.py configs/layton.py:xl_t2i --data.path IMAGES --data.text FEATURES.safetensors

with FEATURES as of configs/llamagen.py. Only the aim, the two trainings and
the number of codes and steps are known from the paper's abstract: networks, sizes, losses and lengths are a proposal. There the
diffusion below is a published one; here it is trained from nothing, told the codes from its first update. What a step must agree with
is the network's own earlier answer, not that of a moving average.
"""

import dataclasses

import jax.numpy as jnp
import llamagen
import mar
from flextok import FLOW

from ar_jax.config import Experiment, Losses, Sampling, TokenizerStage
from ar_jax.data import Data
from ar_jax.decode.guidance import Interval
from ar_jax.decode.logits import Filter
from ar_jax.nets.conditioning import Caption
from ar_jax.nets.denoiser import Denoiser
from ar_jax.tokenizers.consistency import ConsistencyDecoder
from ar_jax.tokenizers.kl_vae import KLVAE
from ar_jax.tokenizers.patches import Patches
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.train.optim import AdamW, Optim

TEACHER = (("teacher", "denoiser"),)  # what the second training begins as what
FRESH = ("^teacher/",)  # which the first has not
DENOISER = ("^/denoiser/",)  # and what it moves


def mnist5k_noise() -> Experiment:
    """On patches of pixels, with the reader's training in one."""
    base = llamagen.mnist5k()
    pixels = Patches(size=(32, 32), patch=4, channels=1, shift=(-0.75,), scale=(1.6,))
    reader = base.tokenizer.module.clone(size=(16, 16), mult=(1, 2))
    module = ConsistencyDecoder(pixels, reader, Denoiser(3, 96, 4, hidden=256), steps=10)
    stage = dataclasses.replace(
        base.tokenizer, module=module, losses=FLOW, steps=500, preview_every=250, save_every=250
    )  # fmt: skip
    return Experiment(name="mnist5k_noise_layton", data=base.data, tokenizer=stage)


def mnist5k() -> Experiment:
    base, first = llamagen.mnist5k(), mnist5k_noise().tokenizer
    stage = dataclasses.replace(
        first, module=first.module.clone(consistent=True, steps=2), losses=base.tokenizer.losses, steps=250,
        start="runs/mnist5k_noise_layton/tokenizer", fresh=FRESH, alike=TEACHER,
        optim=dataclasses.replace(first.optim, lr=5e-4, trained=DENOISER), preview_every=125, save_every=125,
    )  # fmt: skip
    return dataclasses.replace(base, name="mnist5k_layton", tokenizer=stage)


def autoencoder() -> KLVAE:
    """Without attention, so that it takes images of any size."""
    return KLVAE(mult=(1, 2, 4, 4), latent=4, encoder_attention=(), decoder_attention=(), dtype=jnp.bfloat16)


def vae() -> Experiment:
    """Trained as KL-16 is."""
    base = mar.kl16()
    return dataclasses.replace(
        base, name="layton_vae", tokenizer=dataclasses.replace(base.tokenizer, module=autoencoder())
    )


def module(**fields) -> ConsistencyDecoder:
    reader = VQGAN(mult=(1, 1, 2, 2, 4), dtype=jnp.bfloat16)
    denoiser = Denoiser(28, 1152, 16, dtype=jnp.bfloat16, remat="dots")
    below = autoencoder().clone(size=(1024, 1024), patch=2)
    return ConsistencyDecoder(below, reader, denoiser, **fields)


def noise() -> Experiment:
    return Experiment(
        name="layton_noise",
        data=Data(name="image_folder", path="data/laion", size=1024, crop="random", flip=True),
        tokenizer=TokenizerStage(
            module=module(steps=50), losses=FLOW,
            parts=(("base", "runs/layton_vae/tokenizer"), ("reader", "runs/llamagen_vq16/tokenizer")),
            steps=500_000, batch=256,
            optim=Optim(
                lr=1e-4, rule=AdamW((0.9, 0.99)), weight_decay=0.0, clip=1.0, warmup=1000, ema=0.9999, trained=DENOISER
            ),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


def consistency() -> Experiment:
    base = noise()
    stage = dataclasses.replace(
        base.tokenizer, module=module(consistent=True, steps=2), losses=Losses(lpips=1.0, adversarial=0.0),
        parts=(), start="runs/layton_noise/tokenizer", fresh=FRESH, alike=TEACHER, steps=50_000, batch=64,
        optim=dataclasses.replace(base.tokenizer.optim, lr=1e-5, ema=0.95),
    )  # fmt: skip
    return dataclasses.replace(base, name="layton_consistency", tokenizer=stage)


def xl_t2i() -> Experiment:
    """LlamaGen's XL on 120 rows of Flan-T5-XL features."""
    return Experiment(
        name="layton_xl_t2i",
        data=Data(
            name="image_folder", path="data/laion", size=1024, text="data/laion/flan_t5_xl.safetensors", text_rows=120
        ),
        tokenizer=TokenizerStage(module=module(consistent=True, steps=2), path="runs/layton_consistency/tokenizer"),
        generator=llamagen.generator(
            llamagen.network("xl", Caption), 500_000, sampling=Sampling(Interval(7.5), filter=Filter(1000))
        ),
    )  # fmt: skip


VARIANTS = {
    "mnist5k_noise": mnist5k_noise, "mnist5k": mnist5k, "vae": vae, "noise": noise, "consistency": consistency,
    "xl_t2i": xl_t2i,
}  # fmt: skip
