"""FlexTok's released tokenizers, with the autoencoder below them, or without it, on latents; no generator is released."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from ar_jax.convert.names import CONV, CONV1, LINEAR, PLAIN, Layout, Rule, count, multiple
from ar_jax.data import Info
from ar_jax.nets.fixed_norm import FixedNorm
from ar_jax.tokenizers.flextok import FlexTok
from ar_jax.tokenizers.kl_vae import KLVAE
from ar_jax.tokenizers.patches import Patches
from ar_jax.tokenizers.quantize_scalar import FSQ
from ar_jax.tokens import sides

Shapes = Mapping[str, tuple[int, ...]]

FEATURES = 64  # of a head; not in the file
PATCH = 2  # side in latent places; of the file only the product with the latent's channels is known
LEVELS = {6: (8, 8, 8, 5, 5, 5), 5: (7, 5, 5, 5, 5), 4: (8, 5, 5, 5), 3: (8, 6, 5)}  # by their number; not in the file
FIXED = set()  # the positions of places are never trained, but the published numbers of parameters count them
ENCODER, DECODER = "encoder.module_dict.enc_", "decoder.module_dict.dec_"
BELOW = "vae.vae."  # before the names of the autoencoder below


def rules(module: nn.Module) -> list[Rule]:
    """Names of a network's parameters in the released files.

    Raises:
      ValueError: FlexTok has no such network.
    """
    if type(module) is not FlexTok:
        raise ValueError(f"FlexTok has no {type(module).__name__}")
    rows, columns = sides(module.base.patch)
    grid, cells = module.base.grid, rows * columns

    def channel_last(x):  # [d f] of theirs: row, column, channel
        return x.reshape(-1, cells, x.shape[-1] // cells).swapaxes(1, 2).reshape(x.shape)

    def channel_first(x):
        return x.reshape(-1, x.shape[-1] // cells, cells).swapaxes(1, 2).reshape(x.shape)

    inwards = Layout(lambda x: channel_first(x.T), lambda x: channel_last(x).T)
    outwards = Layout(lambda x: channel_first(x).T, lambda x: channel_last(x.T))
    bias = Layout(lambda x: channel_first(x[None])[0], lambda x: channel_last(x[None])[0])
    places = Layout(lambda x: x.T.reshape(1, -1, *grid), lambda x: x.reshape(x.shape[1], -1).T)
    line = Layout(lambda x: x.T[None, None], lambda x: x[0, 0].T)
    single = Layout(lambda x: x[0].T, lambda x: x.T[None])
    single_bias = Layout(lambda x: x[0], lambda x: x[None])
    layers = {
        **{
            name: f"attn.{theirs}"
            for name, theirs in (("query", "wq"), ("key", "wk"), ("value", "wv"), ("out", "proj"))
        },
        **{name: f"mlp.{theirs}" for name, theirs in (("gate", "fc1"), ("down", "fc2"), ("up", "fc3"))},
    }
    return [
        *(below_rules(module.base) if isinstance(module.base, KLVAE) else []),
        ("patches/kernel", f"{ENCODER}patch_emb.patch_proj.weight", inwards),
        ("patches/bias", f"{ENCODER}patch_emb.patch_proj.bias", PLAIN),
        ("encoder_positions", f"{ENCODER}posemb_module.posembs", places),
        ("queries", f"{ENCODER}register_module.registers", PLAIN),
        ("to_code/kernel", f"{ENCODER}to_latents.proj.weight", LINEAR),
        ("to_code/bias", f"{ENCODER}to_latents.proj.bias", PLAIN),
        ("from_code/kernel", f"{DECODER}from_latents.proj.weight", LINEAR),
        ("from_code/bias", f"{DECODER}from_latents.proj.bias", PLAIN),
        ("register_positions", f"{DECODER}registers_posemb_module.posembs", line),
        ("hidden", f"{DECODER}nested_dropout.dropout_mask_token", PLAIN),
        ("nothing", f"{DECODER}latent_dropout.nullcond", PLAIN),
        ("noisy/kernel", f"{DECODER}noise_patch_emb.patch_proj.weight", inwards),
        ("noisy/bias", f"{DECODER}noise_patch_emb.patch_proj.bias", PLAIN),
        ("decoder_positions", f"{DECODER}patches_posemb_module.posembs", places),
        *(
            (f"time/fc{i + 1}/{ours}", f"{DECODER}time_embedder.mlp.{2 * i}.{theirs}", layout)
            for i in range(2)
            for ours, theirs, layout in (("kernel", "weight", LINEAR), ("bias", "bias", PLAIN))
        ),
        *(
            (f"{tower}/blocks/{ours}/kernel", f"{where}transformer.blocks.{{}}.{theirs}.weight", LINEAR)
            for tower, where in (("encoder", ENCODER), ("decoder", DECODER))
            for ours, theirs in layers.items()
        ),
        ("decoder/ada/kernel", f"{DECODER}transformer.blocks.{{}}.adaLN_modulation.1.weight", LINEAR),
        ("decoder/ada/bias", f"{DECODER}transformer.blocks.{{}}.adaLN_modulation.1.bias", PLAIN),
        ("decoder/ada_final/kernel", f"{DECODER}to_patches.adaLN_modulation.1.weight", single),
        ("decoder/ada_final/bias", f"{DECODER}to_patches.adaLN_modulation.1.bias", single_bias),
        ("to_velocity/kernel", f"{DECODER}to_patches.proj.weight", outwards),
        ("to_velocity/bias", f"{DECODER}to_patches.proj.bias", bias),
    ]


def below_rules(module: KLVAE) -> list[Rule]:
    """Names of the autoencoder's parameters, which are those of the package diffusers."""
    last = len(module.mult) - 1

    def level(match, rest):  # their decoder counts levels from the coarsest
        encodes = match[1] == "encoder"
        blocks = f"down_blocks.{match[2]}" if encodes else f"up_blocks.{last - int(match[2])}"
        return f"{BELOW}{match[1]}.{blocks}.{rest}"

    side, rules = "base/(encoder|decoder)", []
    attention = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm"}
    for leaf, end in (("kernel", "weight"), ("scale", "weight"), ("bias", "bias")):
        kind, linear = (CONV, LINEAR) if leaf == "kernel" else (PLAIN, PLAIN)
        rules += [
            (f"base/(quant|post_quant)/{leaf}", rf"{BELOW}\1_conv.{end}", CONV1 if leaf == "kernel" else PLAIN),
            (f"{side}/(conv_in|conv_out)/{leaf}", rf"{BELOW}\1.\2.{end}", kind),
            (f"{side}/norm_out/{leaf}", rf"{BELOW}\1.conv_norm_out.{end}", kind),
            *(
                (f"{side}/mid_1/{ours}/{leaf}", rf"{BELOW}\1.mid_block.attentions.0.{theirs}.{end}", linear)
                for ours, theirs in attention.items()
            ),
            *(
                (rf"{side}/mid_{place}/(\w+)/{leaf}", rf"{BELOW}\1.mid_block.resnets.{i}.\2.{end}", kind)
                for i, place in enumerate((0, 2))
            ),
            (rf"{side}/down_(\d+)/{leaf}", lambda m, end=end: level(m, f"downsamplers.0.conv.{end}"), kind),
            (rf"{side}/up_(\d+)/{leaf}", lambda m, end=end: level(m, f"upsamplers.0.conv.{end}"), kind),
            (
                rf"{side}/res_(\d+)_(\d+)/nin_shortcut/{leaf}",
                lambda m, end=end: level(m, f"resnets.{m[3]}.conv_shortcut.{end}"),
                kind,
            ),
            (
                rf"{side}/res_(\d+)_(\d+)/(\w+)/{leaf}",
                lambda m, end=end: level(m, f"resnets.{m[3]}.{m[4]}.{end}"),
                kind,
            ),
        ]
    return rules


def below(shapes: Shapes, places: tuple[int, int], groups: int = 32) -> KLVAE:
    """The autoencoder whose latents have so many rows and columns."""
    features, channels = shapes[f"{BELOW}encoder.conv_in.weight"][:2]
    block = f"{BELOW}encoder.down_blocks."
    levels, where = count(shapes, block.replace(".", r"\.") + r"(\d+)\."), block.replace(".", r"\.")
    return KLVAE(
        size=tuple(side * 2 ** (levels - 1) for side in places), features=features,
        mult=tuple(multiple(shapes, f"{block}{i}.resnets.0.conv1.weight", features) for i in range(levels)),
        res_blocks=count(shapes, where + r"0\.resnets\.(\d+)\."), latent=shapes[f"{BELOW}post_quant_conv.weight"][0],
        patch=PATCH, groups=groups, channels=channels, encoder_attention=(), decoder_attention=(),
    )  # fmt: skip


def tokenizer(shapes: Shapes, heads: int = 0, groups: int = 32) -> FlexTok:
    """The tokenizer whose state dict has these keys and shapes; without an autoencoder in it, that of latents.

    Args:
      heads: of the encoder; 0 are heads of 64 channels, as published. The decoder has heads of as many channels.
    Raises:
      ValueError: sizes that no such network has.
    """
    registers, width = shapes[f"{ENCODER}register_module.registers"]
    _, _, rows, columns = shapes[f"{ENCODER}posemb_module.posembs"]
    features = width // heads if heads else FEATURES
    levels = shapes[f"{ENCODER}to_latents.proj.weight"][0]
    if levels not in LEVELS:
        raise ValueError(f"codes are of {levels} numbers, whose levels are not known; known are those of {[*LEVELS]}")

    def tower(where, kinds):
        width, numbers = shapes[f"{where}{'noise_' * bool(kinds)}patch_emb.patch_proj.weight"]
        if width % features or numbers % PATCH**2:
            raise ValueError(
                f"width {width} is no multiple of {features}, or {numbers} numbers of a token none of {PATCH}x{PATCH}"
            )
        hidden = shapes[f"{where}transformer.blocks.0.mlp.fc1.weight"][0]
        layers = count(shapes, rf"{where}transformer\.blocks\.(\d+)\.".replace("_dict.", r"_dict\."))
        return FixedNorm(layers, width, width // features, hidden=hidden, kinds=kinds), numbers

    (encoder, numbers), (decoder, _) = tower(ENCODER, 0), tower(DECODER, 2)
    places = PATCH * rows, PATCH * columns
    if any(key.startswith(BELOW) for key in shapes):
        base = below(shapes, places, groups)
    else:
        base = Patches(places, PATCH, channels=numbers // PATCH**2)
    return FlexTok(base, registers, encoder, decoder, FSQ(LEVELS[levels]))


def recognise(shapes: Shapes) -> str:
    """ "tokenizer", or "" for files of others, judged by a few keys; `build` may yet fail."""
    return (
        "tokenizer"
        if {f"{ENCODER}register_module.registers", f"{DECODER}latent_dropout.nullcond"} & shapes.keys()
        else ""
    )


def build(kind: str, shapes: Shapes, *, size: int, heads: int, groups: int, scales: tuple[int, ...]) -> nn.Module:
    """The network of a file; see `llamagen.build`. The file says the size of the latents."""
    return tokenizer(shapes, heads, groups or 32)


def describe(module: nn.Module) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    (height, width), whole = module.size, isinstance(module.base, KLVAE)
    return (
        f"{height}x{width} {'pixels' if whole else f'latents of {module.channels} channels'} to {module.registers} ordered "
        f"tokens, {module.encoder.layers} and {module.decoder.layers} layers"
        + ("; what its latents are multiplied by is not in the file: set module.base.scale in model.json" * whole),
        Info(),
        {},
    )
