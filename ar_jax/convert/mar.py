"""MAR's released checkpoints: the tokenizer KL-16 and the masked transformers."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from ar_jax.convert.names import CONV, CONV1, LINEAR, PLAIN, Layout, Rule, count, multiple, qkv_layout
from ar_jax.data import Info
from ar_jax.decode.guidance import Linear
from ar_jax.decode.sampling import Sampling
from ar_jax.files import codec
from ar_jax.generators.masked import Masked
from ar_jax.heads.diffusion import Diffusion
from ar_jax.nets.conditioning import Label
from ar_jax.nets.vit import ViT
from ar_jax.orders import Shuffled
from ar_jax.tokenizers.kl_vae import KLVAE
from ar_jax.tokenizers.latent_pyramid import LatentPyramid
from ar_jax.tokens import TokenSpec, grid, sides

HEADS = {768: 12, 1024: 16, 1280: 16}  # by width; not in the file
GUIDANCE = {768: 2.9, 1024: 3.0, 1280: 3.2}  # published scales at the end of the linear rise, by width
FIXED = set()  # all parameters are trained
AVERAGED = ("generator",)  # trained as MAR is, whose figures are of the average
SCALE = 0.2325  # what the published generators multiply latents with


def tokenizer_rules(tokenizer: KLVAE) -> list[Rule]:
    """LDM's names."""
    side, middle = "(encoder|decoder)", ("block_1", "attn_1", "block_2")

    def level(match, rest):  # both sides count levels from the finest
        return f"{match[1]}.{'down' if match[1] == 'encoder' else 'up'}.{match[2]}.{rest}"

    rules = []
    for leaf, key in (("kernel", "weight"), ("scale", "weight"), ("bias", "bias")):
        kind, point = (CONV, CONV1) if leaf == "kernel" else (PLAIN, PLAIN)
        rules += [
            (rf"(quant|post_quant)/{leaf}", rf"\1_conv.{key}", point),
            (rf"{side}/(conv_in|conv_out|norm_out)/{leaf}", rf"\1.\2.{key}", kind),
            (rf"{side}/mid_1/(q|k|v|proj_out)/{leaf}", rf"\1.mid.attn_1.\2.{key}", point),
            (
                rf"{side}/mid_(\d)/(\w+)/{leaf}",
                lambda m, key=key: f"{m[1]}.mid.{middle[int(m[2])]}.{m[3]}.{key}",
                kind,
            ),
            (rf"{side}/down_(\d+)/{leaf}", lambda m, key=key: level(m, f"downsample.conv.{key}"), kind),
            (rf"{side}/up_(\d+)/{leaf}", lambda m, key=key: level(m, f"upsample.conv.{key}"), kind),
            (rf"{side}/res_(\d+)_(\d+)/(\w+)/{leaf}", lambda m, key=key: level(m, f"block.{m[3]}.{m[4]}.{key}"), kind),
            (
                rf"{side}/attn_(\d+)_(\d+)/(q|k|v|proj_out)/{leaf}",
                lambda m, key=key: level(m, f"attn.{m[3]}.{m[4]}.{key}"),
                point,
            ),
            (rf"{side}/attn_(\d+)_(\d+)/norm/{leaf}", lambda m, key=key: level(m, f"attn.{m[3]}.norm.{key}"), kind),
        ]
    return rules


def tokenizer(shapes: Mapping[str, tuple[int, ...]], size: int, groups: int = 32) -> KLVAE:
    """The tokenizer whose state dict has these keys and shapes, with the published scale."""
    features = shapes["encoder.conv_in.weight"][0]
    levels = max(count(shapes, r"encoder\.down\.(\d+)\."), 1)

    def attention(side):  # the coarsest level is called -1, as in the defaults
        found = (level for level in range(levels) if f"{side}.{level}.attn.0.q.weight" in shapes)
        return tuple(level if level < levels - 1 else -1 for level in found)

    return KLVAE(
        size=(size, size), features=features, groups=groups, latent=shapes["post_quant_conv.weight"][0],
        mult=tuple(multiple(shapes, f"encoder.down.{i}.block.0.conv1.weight", features) for i in range(levels)),
        res_blocks=count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        channels=shapes["encoder.conv_in.weight"][1], shift=(0.0,), scale=(SCALE,),
        encoder_attention=attention("encoder.down"), decoder_attention=attention("decoder.up"),
    )  # fmt: skip


def layer_rules(ours: str, theirs: str, heads: int) -> list[Rule]:
    """Names of the blocks of a `ViT`."""
    bias = qkv_bias(heads)
    pairs = (
        ("attention_norm", "norm1"),
        ("mlp_norm", "norm2"),
        ("out", "attn.proj"),
        ("fc1", "mlp.fc1"),
        ("fc2", "mlp.fc2"),
    )
    return [
        (f"{ours}/qkv/kernel", f"{theirs}.{{}}.attn.qkv.weight", qkv_layout(heads)),
        (f"{ours}/qkv/bias", f"{theirs}.{{}}.attn.qkv.bias", bias),
        *layers(ours + "/", theirs + ".{}.", pairs),
    ]  # fmt: skip


def layers(ours: str, theirs: str, pairs: tuple[tuple[str, str], ...]) -> list[Rule]:
    """Names of linear layers and norms, with biases or without."""
    leaves = (("kernel", "weight", LINEAR), ("scale", "weight", PLAIN), ("bias", "bias", PLAIN))
    return [
        (f"{ours}{our}/{leaf}", f"{theirs}{their}.{key}", kind) for our, their in pairs for leaf, key, kind in leaves
    ]


def qkv_bias(heads: int, parts: int = 3) -> Layout:
    """Our joint bias [3f] holds query, key and value head by head; theirs all queries first. Two parts are keys and values."""

    def reordered(x, first, second):
        return x.reshape(first, second, -1).swapaxes(0, 1).reshape(-1)

    return Layout(lambda x: reordered(x, heads, parts), lambda x: reordered(x, parts, heads))


def generator_rules(generator: Masked) -> list[Rule]:
    row = Layout(lambda x: x[None], lambda x: x[0])
    token = Layout(lambda x: x[None, None], lambda x: x[0, 0])
    net = "diffloss.net."
    return [
        ("conditioning/embedding", "class_emb.weight", PLAIN),
        ("conditioning/none", "fake_latent", PLAIN),
        ("mask_token", "mask_token", token),
        (r"(encoder|decoder)_positions", r"\1_pos_embed_learned", row),
        ("head_positions", "diffusion_pos_embed_learned", row),
        *layers("", "", (
            ("input", "z_proj"), ("input_norm", "z_proj_ln"), ("decoder_input", "decoder_embed"),
            ("encoder/norm", "encoder_norm"), ("decoder/norm", "decoder_norm"),
        )),
        *layer_rules("encoder/blocks", "encoder_blocks", generator.encoder.heads),
        *layer_rules("decoder/blocks", "decoder_blocks", generator.decoder.heads),
        *layers("head/net/", net, (
            ("input", "input_proj"), ("condition", "cond_embed"), ("time/fc1", "time_embed.mlp.0"),
            ("time/fc2", "time_embed.mlp.2"), ("output", "final_layer.linear"),
            ("modulation", "final_layer.adaLN_modulation.1"),
        )),
        *layers("head/net/blocks/", net + "res_blocks.{}.", (
            ("norm", "in_ln"), ("fc1", "mlp.0"), ("fc2", "mlp.2"), ("modulation", "adaLN_modulation.1"),
        )),
    ]  # fmt: skip


def generator(shapes: Mapping[str, tuple[int, ...]], heads: int = 0) -> Masked:
    """The transformer whose state dict has these keys and shapes.

    Args:
      heads: of both networks; 0 takes the published number for the width.
    """
    n = shapes["diffusion_pos_embed_learned"][1]
    encoder, decoder, buffer, side = networks(shapes, n, heads)
    classes, width = shapes["class_emb.weight"]
    head = Diffusion(shapes["diffloss.net.input_proj.weight"][0], count(shapes, r"diffloss\.net\.res_blocks\.(\d+)\."))
    spec = TokenSpec(grid(side, side), channels=shapes["z_proj.weight"][1])
    return Masked(encoder, decoder, Label(width, apart=True), head, buffer).complete(spec, Info(classes=classes))


def networks(shapes: Mapping[str, tuple[int, ...]], n: int, heads: int) -> tuple[ViT, ViT, int, int]:
    """Encoder and decoder of a file with places for n tokens, its buffer, and the side of the square the tokens make."""
    side, buffer = round(n**0.5), shapes["encoder_pos_embed_learned"][1] - n
    if side**2 != n:
        raise ValueError(f"the file has places for {n} tokens, which make no square")

    def net(name):
        hidden, width = shapes[f"{name}_blocks.0.mlp.fc1.weight"]
        number = heads or HEADS.get(width, 0)
        if not number:
            raise ValueError(
                f"the file does not hold the number of heads and width {width} is not published; give --heads"
            )
        layers = count(shapes, rf"{name}_blocks\.(\d+)\.")
        return ViT(layers, width, number, hidden=hidden, dropout=0.1, attention_dropout=0.1)

    return net("encoder"), net("decoder"), buffer, side


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """ "tokenizer", "generator" or "" for files that are not MAR's, judged by a few keys; `build` may yet fail."""
    if any(key.startswith("encoder.down.") for key in shapes) and not any(k.startswith("quantize") for k in shapes):
        return "tokenizer"
    known = {"diffusion_pos_embed_learned", "encoder_pos_embed_learned"} <= shapes.keys()
    return "generator" if known and "cond_tokens" not in shapes else ""  # which are Hi-MAR's


def build(
    kind: str,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    size: int,
    heads: int,
    groups: int,
    scales: tuple[int, ...],
) -> nn.Module:
    """The network of a file; the arguments are those of `llamagen.build`.

    With `scales`, a tokenizer becomes the pyramid of FlowAR.
    """
    if kind == "generator":
        return generator(shapes, heads)
    found = tokenizer(shapes, size or 256, groups or 32)
    if not scales:
        return found
    if sides(scales[-1]) != found.grid:
        raise ValueError(f"--scales is {scales}, but the last one must be the grid of the image's tokens, {found.grid}")
    return LatentPyramid(found, scales)


def buffers(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Entries of the file that are no part of the network: a tokenizer's discriminator and losses."""
    return {key: tuple(shape) for key, shape in shapes.items() if key.startswith("loss.")}


def describe(module: nn.Module) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    if isinstance(module, LatentPyramid):
        scales = " ".join(map(str, module.scales))
        return f"{describe(module.base)[0]}, averaged to scales {scales}", Info(), {}
    if isinstance(module, KLVAE):
        (height, width), (rows, columns) = module.size, module.grid
        return f"{height}x{width} pixels to {rows}x{columns} tokens of {module.spec.channels} numbers", Info(), {}
    encoder, decoder, head, classes = module.encoder, module.decoder, module.head, module.conditioning.classes
    _, rows, columns = module.spec.coords.max(0) + 1
    words = (
        f"{encoder.layers}+{decoder.layers} layers of width {encoder.width} with {encoder.heads} heads, diffusion head of "
        f"{head.depth} layers of width {head.width}, {rows}x{columns} tokens of {head.channels} numbers, {classes} classes"
    )
    sampling = codec.encode(Sampling(Linear(GUIDANCE.get(encoder.width, 1.0))))
    return words, Info(classes=classes), {"order": codec.encode(Shuffled(min(64, module.spec.n))), "sampling": sampling}


def rules(module: nn.Module) -> list[Rule]:
    """Names of a network's parameters in the released files.

    Raises:
      ValueError: MAR has no such network.
    """
    if type(module) is LatentPyramid:
        return rules(module.base)
    if type(module) is KLVAE:
        return tokenizer_rules(module)
    if type(module) is Masked and isinstance(module.head, Diffusion) and getattr(module.conditioning, "apart", False):
        return generator_rules(module)
    raise ValueError(f"MAR has no {type(module).__name__}")
