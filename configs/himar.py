"""Hi-MAR: a few low-resolution tokens first, the pivots, then all others in a few steps (arXiv:2505.20288).

    python train.py configs/himar.py:VARIANT
    python sample.py runs/himar_VARIANT                    runs/mnist5k_himar for the small one

What ran here, pictures, and addresses of released weights: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits, 4x4 pivots and 8x8 tokens

ImageNet classes, 256 pixels, 8x8 pivots in 32 steps of 100 denoising steps, 16x16 tokens in steps of 250:

    variant          parameters   published: steps, guidance and that of the pivots in SIZES
    b_256            245M         FID 1.93, IS 293.0
    l_256            530M         FID 1.66, IS 322.3
    h_256            1.1B         FID 1.52, IS 322.78

With the released tokenizer, MAR's:

    python -m ar_jax.convert kl16.ckpt --family himar --scales 8 16 --to checkpoints/kl16_himar
    python train.py configs/himar.py:b_256
    python sample.py runs/himar_b_256 --count 50000 --out b_256.npz

The number of epochs is MAR's. Classes are left out for the other tokens of the images beside those for whose pivots they are.
"""

import dataclasses
from functools import partial

import jax.numpy as jnp
import mar

from ar_jax.config import Experiment, Sampling, TokenizerStage
from ar_jax.generators.himar import ByResolution, HiMar, Resolutions, TaskViT
from ar_jax.heads.diffusion import Diffusion
from ar_jax.heads.joint_diffusion import JointDiffusion
from ar_jax.nets.conditioning import Label
from ar_jax.tokenizers.image_pyramid import ImagePyramid
from ar_jax.tokenizers.kl_vae import KLVAE

# layers of encoder and decoder each, width, heads; layers and width of the pivots' head; of the other: layers, width, heads;
# steps, guidance, that of the pivots
SIZES = {
    "b": (12, 768, 12, 6, 1024, 6, 512, 8, 4, 2.5, 2.7),
    "l": (16, 1024, 16, 8, 1280, 8, 512, 8, 4, 3.5, 3.5),
    "h": (20, 1280, 16, 12, 1536, 12, 768, 12, 12, 3.2, 5.5),
}


def mnist5k() -> Experiment:
    """On the tokenizer of MAR's, of images in two sizes."""
    base = mar.mnist5k()
    module = HiMar(
        TaskViT(layers=2, width=128, heads=4, hidden=384), TaskViT(layers=4, width=128, heads=4, hidden=384),
        Label(128, apart=True), Diffusion(width=128, depth=3, steps="50", latest=950),
        JointDiffusion(width=96, depth=2, heads=4, multiplier=2, steps="50", latest=950), buffer=8,
    )  # fmt: skip
    return dataclasses.replace(
        base,
        name="mnist5k_himar",
        tokenizer=dataclasses.replace(base.tokenizer, module=ImagePyramid(base.tokenizer.module, scales=(4, 8))),
        generator=dataclasses.replace(
            base.generator, module=module, order=Resolutions(4, 8), sampling=Sampling(ByResolution(2.5, 3.0))
        ),
    )


def network(model: str) -> HiMar:
    """A published size, in bfloat16."""
    layers, width, heads, depth, head_width, joint_depth, joint_width, joint_heads, *_ = SIZES[model]

    def net():
        return TaskViT(layers, width, heads, dropout=0.1, attention_dropout=0.1, dtype=jnp.bfloat16, remat="dots")

    head = Diffusion(head_width, depth, dtype=jnp.bfloat16, remat="full")
    joint = JointDiffusion(joint_width, joint_depth, joint_heads, dtype=jnp.bfloat16, remat="full")
    return HiMar(net(), net(), Label(width, apart=True), head, joint, told=0.25, told_after=100 * mar.EPOCH)


def class_conditional(model: str) -> Experiment:
    """ImageNet classes, on the latents of KL-16 at 128 and 256 pixels."""
    base, (*_, steps, weight, pivots) = mar.class_conditional(model), SIZES[model]
    optim = dataclasses.replace(base.generator.optim, no_decay=("head/",))
    tokenizer = ImagePyramid(KLVAE(shift=(0.0,), scale=(0.2325,)), scales=(8, 16))
    return dataclasses.replace(
        base,
        name=f"himar_{model}_256",
        tokenizer=TokenizerStage(module=tokenizer, path="checkpoints/kl16_himar"),
        generator=dataclasses.replace(
            base.generator, module=network(model), order=Resolutions(steps), optim=optim,
            sampling=Sampling(ByResolution(weight, pivots)),
        ),
    )  # fmt: skip


VARIANTS = {"mnist5k": mnist5k, **{f"{model}_256": partial(class_conditional, model) for model in SIZES}}
