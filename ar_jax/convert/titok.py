"""Released tokenizers of TiTok, VQ in two stages and in one and VAE, and of TA-TiTok."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from ar_jax.convert import rar
from ar_jax.convert.mar import layers, qkv_bias
from ar_jax.convert.names import CONV, CONV1, PLAIN, Layout, Rule, count, multiple, qkv_layout
from ar_jax.data import Info
from ar_jax.nets.vit import ClipViT
from ar_jax.tokenizers.maskgit_vqgan import MaskgitVQGAN
from ar_jax.tokenizers.titok import OnLine, TiTok, TiTokVAE
from ar_jax.tokens import sides

Shapes = Mapping[str, tuple[int, ...]]

HEAD = 64  # width of a head in all released models
FIXED = set()  # all parameters are trained


def recognise(shapes: Shapes) -> str:
    """ "tokenizer" or "" for files that are not TiTok's, judged by two keys; `build` may yet fail."""
    return "tokenizer" if {"latent_tokens", "encoder.latent_token_positional_embedding"} <= shapes.keys() else ""


def build(kind: str, shapes: Shapes, *, size: int, heads: int, groups: int, scales: tuple[int, ...]) -> nn.Module:
    """The network of a file; see `llamagen.build`. Its tables of positions say how many patches there are.

    Files do not say whether codes are compared by their angle. Those of the first form, with the decoder of another tokenizer, are.
    Raises:
      ValueError: these patches fill no square.
    """

    def tower(side):
        width = shapes[f"{side}.ln_pre.weight"][0]
        hidden = shapes[f"{side}.transformer.0.mlp.c_fc.weight"][0]
        found = count(shapes, rf"{side}\.transformer\.(\d+)\.")
        return ClipViT(found, width, heads or max(width // HEAD, 1), hidden=0 if hidden == 4 * width else hidden)

    def sides_of(side):
        rows = shapes[f"{side}.positional_embedding"][0]
        number = round(max(rows - 1, 0) ** 0.5)
        if not number or number**2 + 1 != rows:
            raise ValueError(
                f"{side}.positional_embedding has {rows} rows, which is not one more than a square image has patches"
            )
        return number

    _, channels, *cell = shapes["encoder.patch_embed.weight"]
    cell = cell[0] if cell[0] == cell[1] else tuple(cell)
    size = tuple(sides_of("encoder") * pixels for pixels in sides(cell))
    drawn = tuple(pixels // sides_of("decoder") for pixels in size)
    fields = {
        "size": size, "cell": cell, "slots": shapes["latent_tokens"][0], "encoder": tower("encoder"),
        "decoder": tower("decoder"), "drawn_cell": 0 if drawn == sides(cell) else drawn, "channels": channels,
    }  # fmt: skip
    if "decoder.text_guidance_proj.weight" in shapes:
        fields["text_rows"] = shapes["decoder.text_guidance_positional_embedding"][0]
        fields["text_width"] = shapes["decoder.text_guidance_proj.weight"][1]
    if "quantize.embedding.weight" not in shapes:
        return TiTokVAE(**fields, latent=shapes["decoder.decoder_embed.weight"][1])
    codes, code_features = shapes["quantize.embedding.weight"]
    first = "decoder.ffn.2.weight" in shapes
    proxy = _proxy(shapes, size, channels, groups or 32) if first else None
    return TiTok(**fields, codes=codes, code_features=code_features, l2_norm=first, proxy=proxy, mixed=first)


def _proxy(shapes, size, channels, groups):
    """The pixel decoder, with its codes."""
    features = shapes["pixel_decoder.conv_out.weight"][1]
    levels = count(shapes, r"pixel_decoder\.up\.(\d+)\.")
    codes, code_features = shapes["pixel_quantize.embedding.weight"]
    return MaskgitVQGAN(
        size, features, tuple(multiple(shapes, f"pixel_decoder.up.{i}.block.0.conv1.weight", features) for i in range(levels)),
        res_blocks=count(shapes, r"pixel_decoder\.up\.0\.block\.(\d+)\."), codes=codes, code_features=code_features,
        groups=groups, channels=channels,
    )  # fmt: skip


def buffers(module: nn.Module, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """How often codes were used in training, which some files hold."""
    name = "quantize.embed_prob"
    return {name: (module.codes,)} if name in shapes and isinstance(module, TiTok) else {}


def describe(module: nn.Module) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    tokens = f"codes out of {module.codes}" if module.spec.codes else f"tokens of {module.latent} numbers"
    return (
        f"{'x'.join(map(str, module.size))} pixels to {module.slots} {tokens} on a line{' and a caption' * bool(module.text_rows)}",
        Info(),
        {},
    )


def rules(module: nn.Module) -> list[Rule]:
    """Names of a network's parameters in the released files.

    Raises:
      ValueError: TiTok has no such network.
    """
    if not isinstance(module, OnLine):
        raise ValueError(f"TiTok has no {type(module).__name__}")
    pairs = (
        ("attention_norm", "ln_1"),
        ("mlp_norm", "ln_2"),
        ("out", "attn.out_proj"),
        ("fc1", "mlp.c_fc"),
        ("fc2", "mlp.c_proj"),
    )
    found = [
        ("queries", "latent_tokens", PLAIN),
        ("query_positions", "encoder.latent_token_positional_embedding", PLAIN),
        ("code_positions", "decoder.latent_token_positional_embedding", PLAIN),
        ("masks", "decoder.mask_token", Layout(lambda x: x[None], lambda x: x[0])),
        (r"(encoder|decoder)_first", r"\1.class_embedding", PLAIN),
        (r"(encoder|decoder)_positions", r"\1.positional_embedding", PLAIN),
        ("patches/kernel", "encoder.patch_embed.weight", _cells(module.channels, sides(module.cell))),
        ("patches/bias", "encoder.patch_embed.bias", PLAIN),
        ("to_code/kernel", "encoder.conv_out.weight", CONV1),
        ("to_code/bias", "encoder.conv_out.bias", PLAIN),
        ("text_positions", "decoder.text_guidance_positional_embedding", PLAIN),
        *layers("", "decoder.", (("from_code", "decoder_embed"), ("text", "text_guidance_proj"))),
    ]
    for side in ("encoder", "decoder"):
        heads, theirs = getattr(module, side).heads, f"{side}.transformer.{{}}."
        found += [
            (f"{side}/blocks/qkv/kernel", f"{theirs}attn.in_proj_weight", qkv_layout(heads)),
            (f"{side}/blocks/qkv/bias", f"{theirs}attn.in_proj_bias", qkv_bias(heads)),
            *layers(f"{side}/blocks/", theirs, pairs),
            *layers(f"{side}/", f"{side}.", (("before", "ln_pre"), ("norm", "ln_post"))),
        ]
    pixels = _pixels(module.channels, sides(module.drawn_cell or module.cell))
    for ours, theirs, kind in (
        ("to_pixels", "ffn.0", pixels), ("smooth", "conv_out", (CONV, PLAIN)), ("proxy_hidden", "ffn.0", (CONV1, PLAIN)),
        ("to_proxy", "ffn.2", (CONV1, PLAIN)),
    ):  # fmt: skip
        found += [
            (f"{ours}/{leaf}", f"decoder.{theirs}.{key}", layout)
            for leaf, key, layout in zip(("kernel", "bias"), ("weight", "bias"), kind)
        ]
    if isinstance(module, TiTok):
        found.append(("codebook", "quantize.embedding.weight", PLAIN))
        proxy = rar.tokenizer_rules(module.proxy) if module.proxy else []
        found += [(f"proxy/{ours}", f"pixel_{theirs}", kind) for ours, theirs, kind in proxy]
    return found


def _cells(channels, cell):
    """Our kernel of patches, whose pixels lie channel by channel, as a convolution."""
    return Layout(lambda x: x.T.reshape(-1, channels, *cell), lambda x: x.reshape(len(x), -1).T)


def _pixels(channels, cell):
    """Kernel and bias of pixels, which in theirs lie place by place."""

    def there(x):
        return x.reshape(channels, *cell, -1).transpose(1, 2, 0, 3).reshape(len(x), -1)

    def back(x):
        return x.reshape(*cell, channels, -1).transpose(2, 0, 1, 3).reshape(len(x), -1)

    kernel = Layout(lambda x: there(x.T)[:, :, None, None], lambda x: back(x[:, :, 0, 0]).T)
    return kernel, Layout(lambda x: there(x[:, None])[:, 0], lambda x: back(x[:, None])[:, 0])
