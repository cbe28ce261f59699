r"""Instella-T2I: an image as a short line of tokens of many bits, drawn one by one or all at once in steps (arXiv:2506.21022).

    python train.py configs/instella.py:VARIANT
    python sample.py runs/mnist5k_instella

What ran here: configs/README.md.

Small, for two CPU cores:

    mnist5k              5,000 real digits, 16 tokens of 16 bits, one by one
    mnist5k_diffusion    the same tokens, all at once in 16 steps

Images of 1024 pixels, of which 128 tokens of 64 bits are made; no figures are published with the code:

    variant              parameters   what                           published
    bae                  428M         tokenizer                      weights
    ar                   877M         captions, token by token       weights
    diffusion            1.3B         captions, 20 steps             weights

The generators read a caption in every layer: layer i that of layer i of AMD-OLMo-1B, a frozen language model.

    python -m ar_jax.convert model.safetensors --to checkpoints/instella_bae
    python train.py configs/instella.py:ar --data.path IMAGES --data.text FEATURES.safetensors

IMAGES holds pictures and captions.jsonl; FEATURES holds `features` [N 128 32768], the hidden states after its 16 layers side by side,
and `mask` [N 128]. Length of training, batch of the tokenizer's training, weights of its losses and its learning rate are ours: none is
published. Not reproduced: an image without its caption reads nothing, where theirs reads an empty prompt (a tenth of the images in
training); and the temperature of the tokenizer's draws stays as it is, where theirs is said to fall.
"""

import dataclasses

import jax.numpy as jnp
import llamagen

from ar_jax.config import Experiment, GeneratorStage, Losses, Sampling, TokenizerStage
from ar_jax.convert.instella import CAPTION, SAMPLING, SPLIT, STEPS
from ar_jax.data import Data
from ar_jax.decode.guidance import Interval
from ar_jax.decode.temperature import Constant
from ar_jax.generators.binary_diffusion import Denoised
from ar_jax.generators.bit_flips import BitFlips
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import Bits
from ar_jax.heads.bitwise import Bitwise
from ar_jax.nets.conditioning import Label
from ar_jax.nets.head_rms import Doubling, Halving
from ar_jax.nets.reader import LayeredCaption, Reader, TimedReader
from ar_jax.orders import OrderFn, raster
from ar_jax.tokenizers.binary_line import BinaryLine
from ar_jax.train.optim import AdamW, Optim

LAYERS, WIDTH, HEADS = 16, 2048, 16


def mnist5k() -> Experiment:
    """Pairs of channels turn with the angles of their own, unlike those of the released tokenizer."""
    base = llamagen.mnist5k()
    net = {"width": 64, "heads": 4, "hidden": 192, "halves": False}
    module = BinaryLine(
        (32, 32), cell=4, slots=16, bits=16, encoder=Halving(2, before=1, **net), decoder=Doubling(3, before=2, **net),
        scale=0, temperature=0.1, code_weight=0.0,
    )  # fmt: skip
    return dataclasses.replace(
        base,
        name="mnist5k_instella",
        tokenizer=dataclasses.replace(
            base.tokenizer, module=module, steps=1500, preview_every=500, save_every=500,
            optim=dataclasses.replace(base.tokenizer.optim, warmup=100),
        ),
        generator=dataclasses.replace(
            base.generator,
            module=Causal(Reader(4, 128, 4, hidden=384), Label(128), Bitwise(single=True), Bits()),
            sampling=Sampling(Interval(2.0), Constant(0.9)),
        ),
    )


def mnist5k_diffusion() -> Experiment:
    base = mnist5k()
    module = BitFlips(TimedReader(4, 128, 4, hidden=384), Label(128))
    return dataclasses.replace(
        base,
        name="mnist5k_diffusion_instella",
        generator=dataclasses.replace(base.generator, module=module, order=Denoised(16)),
    )


def bae() -> Experiment:
    fields = {"before": SPLIT, "dtype": jnp.bfloat16, "remat": "dots"}
    return Experiment(
        name="instella_bae",
        data=Data(name="image_folder", path="data/laion", size=1024, crop="random", flip=True),
        tokenizer=TokenizerStage(
            module=BinaryLine(
                encoder=Halving(12, 768, 12, **fields), decoder=Doubling(16, 1024, 16, **fields), temperature=0.1,
                dtype=jnp.bfloat16,
            ),
            losses=Losses(reconstruction="l1", lpips=1.0, adversarial=0.1, adversarial_start=40_000),
            steps=500_000, batch=256,
            optim=Optim(lr=1e-4, rule=AdamW((0.9, 0.95)), weight_decay=0.0, clip=1.0, warmup=1000),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


def generator(name: str, module: Causal | BitFlips, order: OrderFn) -> Experiment:
    return Experiment(
        name=f"instella_{name}",
        data=Data(
            name="image_folder", path="data/laion", size=1024, crop="random", text="data/laion_olmo.safetensors",
            text_rows=CAPTION,
        ),
        tokenizer=TokenizerStage(module=BinaryLine(), path="checkpoints/instella_bae"),
        generator=GeneratorStage(
            module=module, order=order, steps=500_000, batch=4096, drop=0.1,
            optim=Optim(lr=1e-4, weight_decay=0.0, clip=1.0, warmup=1000),
            sampling=SAMPLING,
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


def ar() -> Experiment:
    net = Reader(LAYERS, WIDTH, HEADS, dtype=jnp.bfloat16, remat="dots")
    head = Bitwise(dtype=jnp.bfloat16, single=True)
    return generator("ar", Causal(net, LayeredCaption(WIDTH, LAYERS), head, Bits()), raster)


def diffusion() -> Experiment:
    net = TimedReader(LAYERS, WIDTH, HEADS, dtype=jnp.bfloat16, remat="dots")
    return generator("diffusion", BitFlips(net, LayeredCaption(WIDTH, LAYERS, start=False)), Denoised(STEPS))


VARIANTS = {
    "mnist5k": mnist5k, "mnist5k_diffusion": mnist5k_diffusion, "bae": bae, "ar": ar, "diffusion": diffusion
}  # fmt: skip
