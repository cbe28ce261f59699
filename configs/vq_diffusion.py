r"""VQ-Diffusion: codes that are hidden, and some replaced, step by step, and brought back (arXiv:2111.14822, arXiv:2205.16007).

    python train.py configs/vq_diffusion.py:VARIANT
    python sample.py runs/vq_diffusion_VARIANT             runs/mnist5k_vq_diffusion for the small one

What ran here, pictures, and addresses of released weights: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits, on the tokenizer of the quickstart; 25 of 100 times

Images of 256 pixels, trained for guidance as in the improved form:

    variant          parameters   tokens                        published
    coco             389M         32x32 of 2,887; captions      FID 8.44
    ithq             1359M        32x32 of 4,096; captions      weights
    imagenet         518M         16x16 of 974; classes         FID 4.83

    python -m ar_jax.convert coco_learnable.pth --entry ema --to checkpoints/vq_diffusion_coco
    python train.py configs/vq_diffusion.py:coco --tokenizer.path RUN --data.path IMAGES --data.text FEATURES.safetensors

Steps that skip times go back over all of them at once; `--generator.stride published` does as the released code, which draws most
codes in the last step. `--generator.reveal purity` draws the surest codes first, so many in every step; `--generator.sharpen 1`
is published with it.

Not as published: the tokenizers are VQGANs of the same codes and sizes (the released ones, whose unused codes are left out, are
not read); the learning rate does not halve where the loss stands still; images are cropped by the rules of `data`. FEATURES holds
the hidden states of CLIP ViT-B/32, 77 a caption; a row for images without a caption is learned.
"""

import jax.numpy as jnp
import llamagen

from ar_jax.config import Experiment, GeneratorStage, Sampling, TokenizerStage
from ar_jax.data import Data
from ar_jax.decode.guidance import Interval
from ar_jax.decode.logits import Filter
from ar_jax.decode.temperature import Constant
from ar_jax.generators.binary_diffusion import Denoised
from ar_jax.generators.code_diffusion import CodeDiffusion
from ar_jax.nets.code_transformer import CodeTransformer
from ar_jax.nets.conditioning import Classes, Features
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.train.optim import AdamW, Optim


def mnist5k() -> Experiment:
    base = llamagen.mnist5k()
    return Experiment(
        name="mnist5k_vq_diffusion",
        data=base.data,
        tokenizer=base.tokenizer,
        generator=GeneratorStage(
            module=CodeDiffusion(CodeTransformer(4, 128, 4, hidden=384), Classes(), aux=1e-2),
            order=Denoised(25), steps=500, batch=64, drop=0.1,
            optim=Optim(lr=2e-3, warmup=50, schedule="cosine", ema=0.99),
            sampling=Sampling(Interval(2.0), Constant(0.9)),
            log_every=50, preview_every=250, save_every=250,
        ),
    )  # fmt: skip


def published(
    name: str, net: CodeTransformer, codes: int, data: Data, *, lr: float, warmup: int, batch: int, steps: int, weight: float,
    kept: float,
) -> Experiment:  # fmt: skip
    """Captions if the network looks at them, else classes."""
    captions = net.cross
    mult = (1, 2, 2, 4) if captions else (1, 1, 2, 2, 4)
    return Experiment(
        name=f"vq_diffusion_{name}",
        data=data,
        tokenizer=TokenizerStage(module=VQGAN(mult=mult, codes=codes), path=f"checkpoints/vqgan_{codes}"),
        generator=GeneratorStage(
            module=CodeDiffusion(
                net, Features() if captions else Classes(), aux=5e-4 if captions else 1e-3, weigh_times=True
            ),
            order=Denoised(100), steps=steps, batch=batch, drop=0.1,
            optim=Optim(
                lr=lr, rule=AdamW((0.9, 0.96)), weight_decay=0.045, clip=0.5, warmup=warmup, warmup_start=0.01, ema=0.9996
            ),
            sampling=Sampling(Interval(weight), filter=Filter(top_p=kept)),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


def captioned(folder: str) -> Data:
    path = f"data/{folder}"
    return Data(name="image_folder", path=path, size=256, crop="random", text=f"{path}/clip.safetensors", text_rows=77)


def coco() -> Experiment:
    net = CodeTransformer(19, 1024, 16, cross=True, dtype=jnp.bfloat16, remat="dots")
    recipe = {"lr": 2e-4, "warmup": 1000, "batch": 128, "steps": 300_000}
    return published("coco", net, 2887, captioned("coco"), **recipe, weight=3.0, kept=1.0)


def ithq() -> Experiment:
    net = CodeTransformer(36, 1408, 16, cross=True, dtype=jnp.bfloat16, remat="dots")
    recipe = {"lr": 4.5e-4, "warmup": 7000, "batch": 512, "steps": 300_000}
    return published("ithq", net, 4096, captioned("ithq"), **recipe, weight=5.0, kept=1.0)


def imagenet() -> Experiment:
    net = CodeTransformer(24, 512, 16, mlp="grid", places=(32, 32), dtype=jnp.bfloat16, remat="dots")
    data = Data(name="image_folder", path="data/imagenet", size=256, crop="random")
    recipe = {"lr": 4.5e-4, "warmup": 5000, "batch": 512, "steps": 250_000}
    return published("imagenet", net, 974, data, **recipe, weight=1.5, kept=0.94)


VARIANTS = {"mnist5k": mnist5k, "coco": coco, "ithq": ithq, "imagenet": imagenet}
