r"""Meissonic: MaskGIT from text, by a network of two streams (arXiv:2410.08261).

    python train.py configs/meissonic.py:VARIANT
    python sample.py runs/meissonic_VARIANT --captions "a red heart"    runs/emoji_meissonic for the small one

What ran here: configs/README.md.

Small, for two CPU cores; what it needs stands in configs/llamagen.py:

    emoji            text to image: colour emoji by their Unicode names; 16 steps

The tokenizer, ImageNet, 256 pixels:

    variant          parameters   codes                published
    vq               54M          16x16 out of 8192    none of this form

Images of captions, 1024 pixels, on 77 rows of CLIP ViT-H features and the vector of a whole caption:

    variant          parameters   published
    1024             1.0B         weights; 64 steps, guidance 9

    python -m ar_jax.convert diffusion_pytorch_model.safetensors --to checkpoints/meissonic_1024
    python train.py configs/meissonic.py:1024 --data.path IMAGES --data.text FEATURES.safetensors

FEATURES holds `features` [N 78 1024] and `mask` [N 78], all true, N in the order of the captions: the hidden rows of the layer before
the last, of the padding too, and after them the projected vector. A source of one's own may give "micro", float [5], with every
record: width and height before the cut, where it began from above and from the left, and a score; without, as the sources here and
caches of tokens are, all images were 1024 pixels large, whole, and scored 6.

Not as published: the tokenizer, which is aMUSEd's and not read here, is MaskGIT's with as many codes; of four stages (256 pixels, 512,
1024, the scores) this is the third, whose length is ours, and others are `--data.size` and `--generator.start`; a tenth of the captions
is dropped, where the published training drops none, so that guidance needs no other text.
"""

import dataclasses
from functools import partial

import jax.numpy as jnp
import llamagen

from ar_jax.config import Experiment, GeneratorStage, Sampling, TokenizerStage
from ar_jax.data import Data
from ar_jax.decode.guidance import Interval
from ar_jax.generators.meissonic import Meissonic, Prompt
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.multimodal import MultiModal
from ar_jax.orders import Confident
from ar_jax.tokenizers.maskgit_vqgan import MaskgitVQGAN
from ar_jax.train.optim import AdamW, Optim

VQ = MaskgitVQGAN(codes=8192, code_features=64, dtype=jnp.bfloat16)


def emoji() -> Experiment:
    """Unicode names as captions, MiniLM as encoder."""
    base = llamagen.emoji()
    net, prompt = MultiModal(3, 128, 4, singles=3, axes=(8, 12, 12), hidden=384), Prompt(128, micro=(32.0, 32.0, 0.0, 0.0, 6.0))
    stage = dataclasses.replace(
        base.generator, module=Meissonic(net, prompt, Categorical(std=0.02)), order=Confident(16), steps=1500, drop=0.1,
        sampling=Sampling(Interval(3.0)),
    )  # fmt: skip
    return dataclasses.replace(base, name="emoji_meissonic", generator=stage)


def published() -> Experiment:
    """The stage at 1024 pixels, in bfloat16."""
    net = MultiModal(14, 1024, 8, singles=28, dtype=jnp.bfloat16, remat="dots")
    module = Meissonic(
        net, Prompt(1024, dtype=jnp.bfloat16), Categorical(std=0.02, dtype=jnp.bfloat16), joined=True, clock="steps",
        vocabulary=8256,
    )  # fmt: skip
    return Experiment(
        name="meissonic_1024",
        data=Data(
            name="image_folder", path="data/captioned", size=1024, crop="random", min_fraction=1.0, text_rows=78
        ),
        tokenizer=TokenizerStage(module=VQ.clone(size=(1024, 1024)), path="runs/meissonic_vq/tokenizer"),
        generator=GeneratorStage(
            module=module, order=Confident(64), steps=100_000, batch=512, drop=0.1,
            optim=Optim(
                lr=1e-4, rule=AdamW((0.9, 0.999)), weight_decay=0.01, clip=10.0, ema=0.9999, no_decay=("embedding$",)
            ),
            sampling=Sampling(Interval(9.0)),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


VARIANTS = {"emoji": emoji, "vq": partial(llamagen.tokenizer, "meissonic_vq", VQ), "1024": published}
