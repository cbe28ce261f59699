"""What LlamaGen's configs share (arXiv:2406.06525)."""

import flax.linen as nn
import jax.numpy as jnp

from ar_jax.config import Experiment, GeneratorStage, Losses, Sampling, TokenizerStage
from ar_jax.data import Data
from ar_jax.decode.guidance import Interval
from ar_jax.decode.logits import Filter
from ar_jax.generators.causal import Causal
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.conditioning import Caption, Label
from ar_jax.nets.transformer import Transformer
from ar_jax.train.optim import Optim

IMAGENET = 1_281_167  # training images
LAYERS_WIDTH_HEADS = {
    "b": (12, 768, 12),
    "l": (24, 1024, 16),
    "xl": (36, 1280, 20),
    "xxl": (48, 1536, 24),
    "3b": (24, 3200, 32),
}


def tokenizer(name: str, module: nn.Module, reset_after: int = 0) -> Experiment:
    """Training of a tokenizer on ImageNet for 40 epochs of 256-pixel images; other papers' are trained so too."""
    return Experiment(
        name=name,
        data=Data(
            name="image_folder", path="data/imagenet/train", size=256, crop="random", min_fraction=0.8, flip=True
        ),
        tokenizer=TokenizerStage(
            module=module,
            losses=Losses(
                reconstruction="l2", lpips=1.0, adversarial=0.5, adversarial_start=20000, reset_after=reset_after
            ),
            steps=40 * (IMAGENET // 128), batch=128,
            optim=Optim(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, clip=1.0),
            preview_every=5000, save_every=5000,
        ),
    )  # fmt: skip


def network(model: str, conditioning: type[nn.Module]) -> Causal:
    """The transformer of a published size, in bfloat16."""
    layers, width, heads = LAYERS_WIDTH_HEADS[model]
    # keeping products only takes a third of the memory and costs no product
    remat = "none" if model in ("b", "l") else "dots"
    backbone = Transformer(layers, width, heads, dropout=0.1, dtype=jnp.bfloat16, remat=remat)
    return Causal(backbone, conditioning(width), Categorical(dtype=jnp.bfloat16), dropout=0.1)


def generator(module: Causal, steps: int, **stage) -> GeneratorStage:
    """Training of a generator: constant AdamW, a tenth of the conditions dropped."""
    return GeneratorStage(
        module=module, steps=steps, batch=256, drop=0.1,
        optim=Optim(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, clip=1.0),
        preview_every=5000, save_every=5000, **stage,
    )  # fmt: skip


def class_conditional(model: str, size: int, guidance: float) -> Experiment:
    """ImageNet classes for 300 epochs, on the ten-crop codes of VQ-16."""
    return Experiment(
        name=f"llamagen_{model}_{size}",
        data=Data(name="image_folder", path="data/imagenet/train", size=size),
        tokenizer=TokenizerStage(path="checkpoints/vq_ds16_c2i" + ("" if size == 256 else f"_{size}")),
        generator=generator(
            network(model, Label), steps=300 * (IMAGENET // 256), tokens=f"cache/imagenet_{size}",
            sampling=Sampling(Interval(guidance)),
        ),
    )  # fmt: skip


def text_conditional(size: int, data: str, steps: int) -> Experiment:
    """XL on 120 rows of Flan-T5-XL features."""
    return Experiment(
        name=f"llamagen_xl_t2i_{size}",
        data=Data(name="image_folder", path=data, size=size, text=f"{data}/flan_t5_xl.safetensors", text_rows=120),
        tokenizer=TokenizerStage(path="checkpoints/vq_ds16_t2i" + ("" if size == 256 else f"_{size}")),
        generator=generator(
            network("xl", Caption),
            steps,
            sampling=Sampling(Interval(7.5), filter=Filter(1000)),
        ),
    )
