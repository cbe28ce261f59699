r"""ELM: next-token prediction of bits, several to a sub-code, all sub-codes of a token at once (arXiv:2410.16257).

    python train.py configs/elm.py:VARIANT
    python sample.py runs/elm_VARIANT                      runs/mnist5k_elm for the small one

What ran here, and addresses of released weights: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits, 8x8 tokens of 2 sub-codes of 4 bits
    mnist5k_3_3      the same, of 3 sub-codes of 3 bits

Tokenizers on ImageNet, 256 pixels to 16x16 tokens:

    variant          parameters   published
    bae_16           63M          weights
    bae_20           63M          weights
    bae_24           63M          weights

ImageNet classes, 256 pixels, 400 epochs; a variant is a size, sub-codes and bits of each. FID without guidance:

    variant          parameters   published
    l_1_16           444M         weights
    l_2_8            313M         weights
    l_2_10           316M         FID 15.95
    l_2_12           328M         weights
    xl_1_16          901M         weights
    xl_2_8           737M         weights
    xl_2_10          741M         FID 12.70
    xl_2_12          757M         weights
    xxl_1_16         1.6B         weights
    xxl_2_10         1.4B         weights
    xxl_2_12         1.4B         FID 10.11
    2b_2_12          1.9B         weights

With the released tokenizer of 20 bits, read as two sub-codes:

    python -m ar_jax.convert bae_20.pth --to checkpoints/elm_2_10 --sub-codes 2
    python train.py configs/elm.py:l_2_10

The best published guidance is not known for every size: `SAMPLING` of ar_jax/convert/elm.py has what is. Learning rate and decay
of the tokenizers' weights are not known: they are Binary Latent Diffusion's. Not here: the masked variants, and images larger than
those of training, put together of windows.
"""

import dataclasses
from functools import partial

import binary_latent
import jax.numpy as jnp
import llamagen

from ar_jax.config import Experiment, GeneratorStage, Sampling, TokenizerStage
from ar_jax.convert.elm import HEADS, SAMPLING, inputs
from ar_jax.data import Data
from ar_jax.decode.guidance import Rising
from ar_jax.decode.temperature import Constant
from ar_jax.generators.causal import Causal
from ar_jax.heads.bitwise import Bitwise
from ar_jax.nets.conditioning import Label
from ar_jax.nets.transformer import Transformer
from ar_jax.tokenizers.binary_autoencoder import BinaryAutoencoder
from ar_jax.train.optim import AdamW, Optim

SIZES = {"l": (24, 1024), "xl": (36, 1280), "xxl": (48, 1536), "2b": (48, 1792)}  # layers, width
PARTS = {  # sub-codes and bits of each, by size
    "l": ((1, 16), (2, 8), (2, 10), (2, 12)),
    "xl": ((1, 16), (2, 8), (2, 10), (2, 12)),
    "xxl": ((1, 16), (2, 10), (2, 12)),
    "2b": ((2, 12),),
}


def mnist5k(name: str, sub_codes: int, bits: int) -> Experiment:
    """On the tokenizer of Binary Latent Diffusion's, whose bits are drawn anew for every update."""
    base = binary_latent.mnist5k()
    module = base.tokenizer.module.clone(bits=sub_codes * bits, parts=(bits,) * sub_codes)
    net = Transformer(layers=4, width=128, heads=4, hidden=384)
    return dataclasses.replace(
        base,
        name=name,
        tokenizer=dataclasses.replace(base.tokenizer, module=module),
        generator=GeneratorStage(
            module=Causal(net, Label(128), Bitwise(bias=False, std=0.0), inputs(sub_codes)),
            steps=1500, batch=64, optim=Optim(lr=2e-3, warmup=50, schedule="cosine", ema=0.99),
            sampling=Sampling(Rising(4.0), Constant(0.9)),
            log_every=50, preview_every=500, save_every=500,
        ),
    )  # fmt: skip


def tokenizer(bits: int) -> Experiment:
    """A million updates; each bit is a sub-code of its own until a generator reads several as one."""
    base = binary_latent.autoencoder(bits, decoder_blocks=0)
    module = base.tokenizer.module.clone(unit=True)
    return dataclasses.replace(
        base,
        name=f"elm_bae_{bits}",
        data=dataclasses.replace(base.data, path="data/imagenet"),
        tokenizer=dataclasses.replace(base.tokenizer, module=module, steps=1_000_000, batch=256),
    )


def class_conditional(model: str, sub_codes: int, bits: int) -> Experiment:
    """ImageNet classes for 400 epochs, on bits that are drawn anew for every update."""
    layers, width = SIZES[model]
    remat = "none" if model == "l" else "dots"
    net = Transformer(layers, width, HEADS[width], dropout=0.1, dtype=jnp.bfloat16, remat=remat)
    head = Bitwise(dtype=jnp.bfloat16, bias=False, std=0.0)
    return Experiment(
        name=f"elm_{model}_{sub_codes}_{bits}",
        data=Data(name="image_folder", path="data/imagenet", size=256, flip=True),
        tokenizer=TokenizerStage(
            module=BinaryAutoencoder(bits=sub_codes * bits, parts=(bits,) * sub_codes, unit=True),
            path=f"checkpoints/elm_{sub_codes}_{bits}",
        ),
        generator=GeneratorStage(
            module=Causal(net, Label(width), head, inputs(sub_codes), dropout=0.1),
            steps=400 * (llamagen.IMAGENET // 256), batch=256, drop=0.1,
            optim=Optim(lr=1e-4, rule=AdamW((0.9, 0.95)), weight_decay=0.05, clip=1.0, ema=0.9999),
            sampling=SAMPLING.get(width, SAMPLING[1024]),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


VARIANTS = {
    "mnist5k": partial(mnist5k, "mnist5k_elm", 2, 4),
    "mnist5k_3_3": partial(mnist5k, "mnist5k_3_3_elm", 3, 3),
    **{f"bae_{bits}": partial(tokenizer, bits) for bits in (16, 20, 24)},
    **{
        f"{model}_{k}_{bits}": partial(class_conditional, model, k, bits) for model in SIZES for k, bits in PARTS[model]
    },
}
