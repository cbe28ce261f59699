"""What the configs of next-scale models share: VAR (arXiv:2404.02905), FlexVAR (2502.20313), HMAR (2506.04421)."""

import dataclasses

import jax.numpy as jnp

from ar_jax.config import Experiment, GeneratorStage, TokenizerStage
from ar_jax.convert.flexvar import SCALES as FLEXVAR_SCALES
from ar_jax.convert.next_scale import FLEXVAR_SAMPLING, GATES, HMAR_SAMPLING, REFINE, VAR_SAMPLING
from ar_jax.convert.var import SCALES
from ar_jax.data import Data
from ar_jax.generators.causal import Causal
from ar_jax.generators.hmar import Hmar
from ar_jax.generators.inputs import NextScale, Upsampled
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.adaln import AdaLN
from ar_jax.nets.conditioning import Label
from ar_jax.orders import DrawnScales, scales
from ar_jax.tokenizers.pyramid import Pyramid
from ar_jax.tokenizers.residual_pyramid import ResidualPyramid
from ar_jax.train.optim import Optim

IMAGENET = 1_281_167  # training images
EPOCHS = {16: 200, 20: 250, 24: 350, 30: 350, 36: 350}
MASKS = 8  # last blocks of HMAR that its two branches do not share


def optimiser(depth: int, epochs: int, batch: int) -> dict:
    """`optim` and `steps` by VAR's table."""
    small, steps = depth <= 20, epochs * (IMAGENET // batch)
    lr = (1e-4 if small else 8e-5) * batch / 256
    optim = Optim(
        lr=lr, betas=(0.9, 0.95), weight_decay=0.05, weight_decay_end=0.08 if depth >= 30 else 0.05, clip=2.0,
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


def data(size: int, fraction: float, flip: bool = False) -> Data:
    """ImageNet by ADM's random crop. VAR's own always crops from 1.125 times the size, here the most it may be."""
    return Data(
        name="image_folder", path="data/imagenet/train", size=size, crop="random", min_fraction=fraction, flip=flip
    )


def var(depth: int, size: int = 256, batch: int = 768) -> Experiment:
    sides = SCALES[size // 16]
    module = Causal(network(depth, shared=size == 512), *ends(depth), NextScale())
    return Experiment(
        name=f"var_d{depth}",
        data=data(size, 1 / 1.125),
        tokenizer=TokenizerStage(
            module=ResidualPyramid((size, size), sides), path="checkpoints/vae_ch160v4096z32" + ("" if size == 256 else "_512")
        ),
        generator=GeneratorStage(
            module=module, order=scales, sampling=VAR_SAMPLING, **optimiser(depth, EPOCHS[depth], batch)
        ),
    )  # fmt: skip


def flexvar(depth: int) -> Experiment:
    epochs = {16: 180, 20: 250, 24: 350}[depth]
    return Experiment(
        name=f"flexvar_d{depth}",
        data=data(256, 0.88, flip=True),
        tokenizer=TokenizerStage(module=Pyramid(scales=tuple(range(1, 17))), path="checkpoints/flexvae_1to16"),
        generator=GeneratorStage(
            module=Causal(network(depth), *ends(depth), Upsampled()), order=scales, train_order=DrawnScales(),
            sampling=dataclasses.replace(FLEXVAR_SAMPLING, fields=(("tokenizer.scales", FLEXVAR_SCALES[16]),)), **optimiser(depth, epochs, 768),
        ),
    )  # fmt: skip


def hmar(depth: int, masks: bool = False) -> Experiment:
    """Training of the next-scale branch, or after it of the masked branch."""
    trunk, (label, head) = depth - MASKS, ends(depth)
    module = Hmar(
        network(depth, 0, trunk, sees="step", final=False), label, head, NextScale(), emphasis="lognorm",
        tail=network(depth, trunk, MASKS, sees="step"), masks=network(depth, trunk, MASKS, sees="step"), mask_head=head,
        refine=REFINE if masks else (), branches=("masks",) if masks else ("scales",),
    )  # fmt: skip
    batch = 1024 if depth == 30 else 768
    settings = optimiser(depth, 100 if masks else EPOCHS[depth], batch)
    trained = (r"^/mask",) if masks else (r"^/(?!mask)",)
    settings["optim"] = settings["optim"].__class__(**vars(settings["optim"]) | {"trained": trained})
    if masks:
        settings |= {"start": f"runs/hmar_d{depth}", "alike": (("masks", "tail"), ("mask_head", "head"))}
    return Experiment(
        name=f"hmar_d{depth}" + ("_masks" if masks else ""),
        data=data(256, 1 / 1.125),
        tokenizer=TokenizerStage(module=ResidualPyramid(), path="checkpoints/vae_ch160v4096z32"),
        generator=GeneratorStage(
            module=module, order=scales, sampling=HMAR_SAMPLING[depth], **settings
        ),
    )  # fmt: skip
