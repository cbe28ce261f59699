r"""FlexTok: 1 to 256 ordered codes of an image, any first part of which a flow turns into a picture (arXiv:2502.13967).

    python train.py configs/flextok.py:VARIANT
    python sample.py runs/flextok_VARIANT                  runs/mnist5k_flextok for the small one

What ran here, and addresses of released weights: configs/README.md.

Small, for two CPU cores:

    mnist5k_vae      5,000 real digits, the autoencoder below
    mnist5k          1 to 16 codes of 240, of the latents of it; LlamaGen's transformer

The autoencoder below all others, on ImageNet, 256 pixels:

    variant          parameters   published
    vae              84M          inside the weights of the others

Tokenizers of its 32x32 latents of 16 numbers, by layers of encoder and decoder, 256 codes of 64,000:

    variant          parameters   published, of 32 tokens
    d12_d12          342M         rFID 4.20
    d18_d18          950M         rFID 1.61
    d18_d28          2.5B         rFID 1.45

Generators on the codes of d18_d28, ImageNet classes and captions:

    variant          parameters   published, of 32 tokens
    c2i              1.6B         FID 1.86
    t2i              3.5B         none

The whole way, and pictures of the first 8 codes, which are all that is drawn:

    python train.py configs/flextok.py:vae
    python train.py configs/flextok.py:d18_d28
    python train.py configs/flextok.py:c2i
    python sample.py runs/flextok_c2i --tokenizer.length 8

A released tokenizer, with its autoencoder:

    python -m ar_jax.convert model.safetensors --to checkpoints/flextok_d18_d28
    python train.py configs/flextok.py:c2i --tokenizer.path checkpoints/flextok_d18_d28

The number its latents are multiplied by is not in the file; it goes to module.base.scale in the folder's model.json.

No generator is released. Its size, its settings and those of the training of the tokenizers are ours, as far as the paper does not
say them, and so is that width and learning rate follow no muP. The decoder's alignment with DINOv2-L is a teacher, by your file:

    --tokenizer.losses.teacher.weight 1 --tokenizer.losses.teacher.on NAME   (see ar_jax/train/README.md)
"""

import dataclasses
from functools import partial

import jax.numpy as jnp
import llamagen
import mar

from ar_jax.config import Experiment, GeneratorStage, Losses, Sampling, TokenizerStage
from ar_jax.data import Data
from ar_jax.decode.guidance import Interval
from ar_jax.generators.causal import Causal
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.conditioning import Caption, Label
from ar_jax.nets.fixed_norm import FixedNorm
from ar_jax.nets.transformer import Transformer
from ar_jax.tokenizers.flextok import FlexTok
from ar_jax.tokenizers.kl_vae import KLVAE
from ar_jax.tokenizers.quantize_scalar import FSQ
from ar_jax.train.optim import AdamW, Optim

BELOW = ("^/(?!base/)",)  # what training of a tokenizer on top of another moves: all but that
FLOW = Losses(reconstruction_weight=0.0, lpips=0.0, adversarial=0.0)  # the tokenizer reports its own


def mnist5k_vae() -> Experiment:
    """MAR's of digits."""
    base = mar.mnist5k()
    return Experiment(name="mnist5k_vae_flextok", data=base.data, tokenizer=base.tokenizer)


def mnist5k() -> Experiment:
    base = llamagen.mnist5k()
    below = mar.mnist5k().tokenizer.module
    net = {"width": 64, "heads": 4, "hidden": 128}
    module = FlexTok(
        below, 16, FixedNorm(2, **net), FixedNorm(2, kinds=2, **net), FSQ((8, 6, 5)), steps=10, guidance=1.5,
        normalised=False,
    )  # fmt: skip
    generator = base.generator.module
    return dataclasses.replace(
        base,
        name="mnist5k_flextok",
        tokenizer=dataclasses.replace(
            base.tokenizer, module=module, losses=FLOW, steps=1500, preview_every=500, save_every=500,
            optim=dataclasses.replace(base.tokenizer.optim, warmup=100, trained=BELOW),
            parts=(("base", "runs/mnist5k_vae_flextok/tokenizer"),),
        ),
        generator=dataclasses.replace(
            base.generator, module=generator.clone(backbone=generator.backbone.clone(line=True))
        ),
    )


def autoencoder() -> KLVAE:
    return KLVAE(mult=(1, 2, 4, 4), latent=16, encoder_attention=(), decoder_attention=(), dtype=jnp.bfloat16)


def vae() -> Experiment:
    """Trained as KL-16 is."""
    base = mar.kl16()
    return dataclasses.replace(
        base, name="flextok_vae", tokenizer=dataclasses.replace(base.tokenizer, module=autoencoder())
    )


def module(encoder: int, decoder: int) -> FlexTok:
    """A published size, in bfloat16: of n layers, 64 n wide."""

    def net(layers, kinds=0):
        return FixedNorm(layers, 64 * layers, layers, kinds=kinds, dtype=jnp.bfloat16, remat="dots")

    below = autoencoder().clone(patch=2)
    return FlexTok(below, encoder=net(encoder), decoder=net(decoder, 2), dtype=jnp.bfloat16)


def tokenizer(encoder: int, decoder: int) -> Experiment:
    return Experiment(
        name=f"flextok_d{encoder}_d{decoder}",
        data=Data(name="image_folder", path="data/imagenet", size=256, crop="random", min_fraction=0.8, flip=True),
        tokenizer=TokenizerStage(
            module=module(encoder, decoder), losses=FLOW, parts=(("base", "runs/flextok_vae/tokenizer"),),
            steps=400 * (llamagen.IMAGENET // 1024), batch=1024,
            optim=Optim(
                lr=2e-4, rule=AdamW((0.9, 0.99)), weight_decay=0.05, clip=1.0, warmup=5000, schedule="cosine", ema=0.9998,
                trained=BELOW,
            ),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


def generator(name: str, layers: int, conditioning: type, data: Data) -> Experiment:
    """A transformer of n layers, 64 n wide, on all 256 codes, whose first ones are those of shorter lines."""
    net = Transformer(layers, 64 * layers, layers, dropout=0.1, line=True, dtype=jnp.bfloat16, remat="dots")
    return Experiment(
        name=f"flextok_{name}",
        data=data,
        tokenizer=TokenizerStage(module=module(18, 28), path="runs/flextok_d18_d28/tokenizer"),
        generator=GeneratorStage(
            module=Causal(net, conditioning(net.width), Categorical(dtype=jnp.bfloat16), dropout=0.1),
            steps=300 * (llamagen.IMAGENET // 1024), batch=1024, drop=0.1,
            optim=Optim(
                lr=2e-4, rule=AdamW((0.9, 0.95)), weight_decay=0.05, clip=1.0, warmup=5000, schedule="cosine", ema=0.9999
            ),
            sampling=Sampling(Interval(1.5)),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


VARIANTS = {
    "mnist5k_vae": mnist5k_vae,
    "mnist5k": mnist5k,
    "vae": vae,
    **{f"d{encoder}_d{decoder}": partial(tokenizer, encoder, decoder) for encoder, decoder in ((12, 12), (18, 18), (18, 28))},
    "c2i": partial(generator, "c2i", 30, Label, Data(name="image_folder", path="data/imagenet", size=256, flip=True)),
    "t2i": partial(
        generator, "t2i", 40, Caption,
        Data(name="image_folder", path="data/photos", size=256, text="data/photos/flan_t5_xl.safetensors", text_rows=120),
    ),
}  # fmt: skip
