"""VQGAN-LC's released tokenizers, with the frozen features they were trained on."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from ar_jax.convert import mar
from ar_jax.convert.names import LINEAR, PLAIN, Rule
from ar_jax.data import Info
from ar_jax.tokenizers.vqgan_lc import VQGANLC

Shapes = Mapping[str, tuple[int, ...]]

FIXED = {"tok_embeddings.weight"}  # held as a parameter but never trained
BESIDE = ("discriminator.", "perceptual_loss.")  # networks of training in the same set


def recognise(shapes: Shapes) -> str:
    """ "tokenizer" or "" for files that are not VQGAN-LC's, judged by a key; `build` may yet fail."""
    return "tokenizer" if "codebook_projection.weight" in shapes else ""


def build(kind: str, shapes: Shapes, *, size: int, heads: int, groups: int, scales: tuple[int, ...]) -> nn.Module:
    """The network of a file; see `llamagen.build`. It works at any size that is a multiple of its stride."""
    like = mar.tokenizer(shapes, size or 256, groups or 32)
    if like.encoder_attention != like.decoder_attention:
        raise ValueError(
            f"its encoder has attention on levels {like.encoder_attention}, its decoder on {like.decoder_attention}"
        )
    codes, feature_width = shapes["tok_embeddings.weight"]
    return VQGANLC(
        size=like.size, features=like.features, mult=like.mult, res_blocks=like.res_blocks, groups=like.groups,
        channels=like.channels, attention=like.encoder_attention, latent=shapes["post_quant_conv.weight"][0], codes=codes,
        code_features=shapes["quant_conv.weight"][0], feature_width=feature_width,
    )  # fmt: skip


def describe(module: nn.Module) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    (height, width), (rows, columns) = module.size, module.grid
    words = (
        f"{height}x{width} pixels to {rows}x{columns} codes out of {module.codes}, made of features of width "
        f"{module.feature_width}"
    )
    return words, Info(), {}


def buffers(module: nn.Module, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """None."""
    return {}


def rules(module: nn.Module) -> list[Rule]:
    """Names of a network's parameters in the released files.

    Raises:
      ValueError: VQGAN-LC has no such network.
    """
    if not isinstance(module, VQGANLC):
        raise ValueError(f"VQGAN-LC has no {type(module).__name__}")
    return [
        ("frozen", "tok_embeddings.weight", PLAIN),
        ("projector/kernel", "codebook_projection.weight", LINEAR),
        ("projector/bias", "codebook_projection.bias", PLAIN),
        *mar.tokenizer_rules(module),
    ]
