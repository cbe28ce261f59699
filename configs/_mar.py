"""What MAR's configs share (arXiv:2406.11838)."""

import jax.numpy as jnp

from ar_jax.config import Experiment, GeneratorStage, Losses, Sampling, TokenizerStage
from ar_jax.data import Data
from ar_jax.decode.guidance import Linear
from ar_jax.generators.masked import Masked
from ar_jax.heads.diffusion import Diffusion
from ar_jax.nets.conditioning import Label
from ar_jax.nets.vit import ViT
from ar_jax.orders import Shuffled
from ar_jax.tokenizers.kl_vae import KLVAE
from ar_jax.train.optim import Optim

IMAGENET = 1_281_167  # training images
BATCH = 2048
EPOCH = IMAGENET // BATCH
# layers of encoder and decoder each, width, heads, layers and width of the head, guidance
SIZES = {"b": (12, 768, 12, 6, 1024, 2.9), "l": (16, 1024, 16, 8, 1280, 3.0), "h": (20, 1280, 16, 12, 1536, 3.2)}


def tokenizer(name: str) -> Experiment:
    """Training of KL-16 on 256-pixel images, with LDM's losses."""
    return Experiment(
        name=name,
        data=Data(name="image_folder", path="data/imagenet/train", size=256, crop="random", flip=True),
        tokenizer=TokenizerStage(
            module=KLVAE(dtype=jnp.bfloat16),
            losses=Losses(
                reconstruction="l1", lpips=1.0, adversarial=0.5, adversarial_start=50001, adaptive=True,
            ),
            steps=40 * (IMAGENET // 128), batch=128,
            optim=Optim(lr=1e-4, betas=(0.5, 0.9), weight_decay=0.0, clip=1.0),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


def network(model: str) -> Masked:
    """A published size, in bfloat16."""
    layers, width, heads, depth, head_width, _ = SIZES[model]

    def net():
        return ViT(layers, width, heads, dropout=0.1, attention_dropout=0.1, dtype=jnp.bfloat16, remat="dots")

    head = Diffusion(head_width, depth, dtype=jnp.bfloat16, remat="full")
    return Masked(net(), net(), Label(width, apart=True), head)


def class_conditional(model: str) -> Experiment:
    """ImageNet classes for 800 epochs, on the latents of KL-16."""
    return Experiment(
        name=f"mar_{model}_256",
        data=Data(name="image_folder", path="data/imagenet/train", size=256, flip=True),
        tokenizer=TokenizerStage(module=KLVAE(), path="checkpoints/kl16"),
        generator=GeneratorStage(
            module=network(model), order=Shuffled(steps=256), steps=800 * EPOCH, batch=BATCH, drop=0.1,
            optim=Optim(
                lr=8e-4, betas=(0.9, 0.95), weight_decay=0.02, clip=3.0, warmup=100 * EPOCH, ema=0.9999,
                no_decay=("/head/",),
            ),
            sampling=Sampling(Linear(SIZES[model][-1])),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip
