"""FlowAR's released checkpoints: next-scale transformers with a joint flow head."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from ar_jax.convert.mar import layers, qkv_bias
from ar_jax.convert.names import LINEAR, PLAIN, Layout, Rule, count, qkv_layout
from ar_jax.data import Info
from ar_jax.decode.guidance import Ramp
from ar_jax.decode.sampling import Sampling
from ar_jax.files import codec
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import NextLatent
from ar_jax.heads.joint_flow import JointFlow
from ar_jax.nets.conditioning import Label
from ar_jax.nets.gated import EncoderDecoder
from ar_jax.orders import scales as scale_order
from ar_jax.tokens import TokenSpec, pyramid

FIXED = set()  # all parameters are trained
AVERAGED = ("generator",)  # trained as MAR is, whose figures are of the average
SPAN = 16  # of the rotary positions
LONGEST = 2**13  # rows of a mask
SCALES = (1, 2, 4, 8, 16)
# as evaluated, by width: guidance of the last scale less 1, steps, latest guided time
EVALUATED = {768: (3.3, 25, 0.9), 1024: (1.4, 25, 0.9), 1536: (1.4, 50, 0.7)}
LEADING = Layout(lambda x: x[None], lambda x: x[0])
Shapes = Mapping[str, tuple[int, ...]]


def attention_rules(ours: str, theirs: str, heads: int) -> list[Rule]:
    return [
        (f"{ours}/(qkv)/kernel", rf"{theirs}.\1.weight", qkv_layout(heads)),
        (f"{ours}/(qkv)/bias", rf"{theirs}.\1.bias", qkv_bias(heads)),
        (f"{ours}/(kv)/kernel", rf"{theirs}.\1.weight", qkv_layout(heads, 2)),
        (f"{ours}/(q)/kernel", rf"{theirs}.\1.weight", LINEAR),
        *layers(ours, theirs, (("/out", ".proj"),)),
    ]


MLP = (("mlp/gate", "mlp.fc1_g"), ("mlp/up", "mlp.fc1_x"), ("mlp/down", "mlp.fc2"))


def backbone_rules(net: EncoderDecoder) -> list[Rule]:
    """Of the two stacks, the class vectors and the projection of tokens, as xAR has them, too."""
    found = [
        ("conditioning/embedding", "class_emb.weight", PLAIN),
        ("backbone/(encoder|decoder)_positions", r"\1_pos_embed_learned", LEADING),
        ("backbone/head_positions", "diffusion_pos_embed_learned", LEADING),
        *layers("backbone/", "", (
            ("input_norm", "z_proj_ln"), ("encoder/norm", "encoder_norm"), ("between", "decoder_embed"),
            ("decoder/norm", "decoder_norm"),
        )),
    ]  # fmt: skip
    for stack, heads in (("encoder", net.heads), ("decoder", net.decoder_heads or net.heads)):
        ours, theirs = f"backbone/{stack}/blocks/", f"{stack}_blocks.{{}}."
        found += attention_rules(f"{ours}attention", f"{theirs}attn", heads)
        found += layers(ours, theirs, (("ada", "ada_lin.1"), *MLP))
    return found


def rules(module: nn.Module) -> list[Rule]:
    """Names of a network's parameters in the released files.

    Raises:
      ValueError: FlowAR has no such network.
    """
    if type(module) is not Causal or not isinstance(module.head, JointFlow):
        raise ValueError(f"FlowAR has no {type(module).__name__} with {type(getattr(module, 'head', None)).__name__}")
    heads = module.head.heads or module.head.width // 64
    ours, theirs = "head/net/blocks/", "flownet.res_blocks.{}."
    return [
        *backbone_rules(module.backbone),
        *layers("inputs/", "", (("word", "z_proj"),)),
        *layers("head/net/", "flownet.", (
            ("time/fc1", "time_embed.mlp.0"), ("time/fc2", "time_embed.mlp.2"), ("condition", "cond_embed"),
            ("input", "input_proj"), ("output", "final_layer.linear"),
            ("modulation", "final_layer.adaLN_modulation.1"),
        )),
        *attention_rules(f"{ours}attention", f"{theirs}attn", heads),
        *attention_rules(f"{ours}cross_attention", f"{theirs}crossattn", heads),
        *layers(ours, theirs, (
            ("ada", "ada_lin"), ("ada_attention", "ada_lin_attn"), ("ada_mlp", "ada_lin_mlp"),
            ("cross_norm", "norm2_1"), ("hidden_norm", "norm2_2"), *MLP,
        )),
    ]  # fmt: skip


def recognise(shapes: Shapes) -> str:
    """ "generator", or "" for files that are not FlowAR's, judged by a few keys; `build` may yet fail."""
    return "generator" if {"flownet.input_proj.weight", "class_emb.weight"} <= shapes.keys() else ""


def backbone(shapes: Shapes, heads: int, **fields: Any) -> EncoderDecoder:
    """The two stacks of a file.

    Args:
      heads: of both; 0 reads them from the tables of rotary frequencies.
    Raises:
      ValueError: it does not hold these tables.
    """
    width = shapes["class_emb.weight"][1]

    def heads_of(stack):
        if heads:
            return heads
        table = shapes.get(f"{stack}_blocks.0.attn.rope.freqs")
        if not table or width % (4 * table[0]):
            raise ValueError(f"the file does not hold the number of heads of {stack}_blocks; give --heads")
        return width // (4 * table[0])  # a frequency for a pair of channels of a row, or column

    hidden = shapes["encoder_blocks.0.mlp.fc1_g.weight"][0]
    numbers = [count(shapes, rf"{stack}_blocks\.(\d+)\.") for stack in ("encoder", "decoder")]
    return EncoderDecoder(
        numbers[0], width, heads_of("encoder"), numbers[1], heads_of("decoder"),
        hidden=0 if hidden == 8 * width // 3 else hidden, dropout=0.1, attention_dropout=0.1, **fields,
    )  # fmt: skip


def build(
    kind: str, shapes: Shapes, *, size: int, heads: int, groups: int, scales: tuple[int, ...]
) -> Causal:  # fmt: skip
    """The network of a file; the arguments are those of `llamagen.build`. `size` and `groups` are unused.

    Raises:
      ValueError: something is needed that neither the file nor the caller knows.
      KeyError: a key is missing.
    """
    n, scales = shapes["encoder_pos_embed_learned"][1], tuple(scales) or SCALES
    if sum(side**2 for side in scales) != n:
        raise ValueError(f"the file has places for {n} tokens, which scales {scales} have not; give --scales")
    net = backbone(shapes, heads, span=SPAN, last_positions=True)
    width, channels = shapes["flownet.input_proj.weight"]
    table = shapes.get("flownet.res_blocks.0.attn.rope.freqs")
    number = width // (4 * table[0]) if table else 0
    _, steps, guided = EVALUATED.get(net.width, (0, 25, 0.9))
    head = JointFlow(
        width, count(shapes, r"flownet\.res_blocks\.(\d+)\."), heads=0 if number == width // 64 else number, span=SPAN,
        cross="flownet.res_blocks.0.crossattn.q.weight" in shapes, steps=steps, guided_until=guided,
    )  # fmt: skip
    module = Causal(net, Label(net.width), head, NextLatent(channels))
    info = Info(classes=shapes["class_emb.weight"][0] - 1)
    return module.complete(TokenSpec(pyramid(scales), channels=channels), info)


def frequencies(stacks: Mapping[str, tuple[int, int, int]]) -> dict[str, np.ndarray]:
    """Tables of rotary frequencies, by key.

    Args:
      stacks: key of the attention, with {} for the layer -> layers, width, heads.
    """
    found = {}
    for key, (number, width, heads) in stacks.items():
        half = width // heads // 2
        table = (10000.0 ** -(np.arange(0, half, 2) / half)).astype(np.float32)
        found |= {f"{key.format(i)}.rope.freqs": table for i in range(number)}
    return found


def stacks(net: EncoderDecoder) -> dict[str, tuple[int, int, int]]:
    """What `frequencies` takes, of the two stacks."""
    return {
        "encoder_blocks.{}.attn": (net.layers, net.width, net.heads),
        "decoder_blocks.{}.attn": (net.decoder_layers or net.layers, net.width, net.decoder_heads or net.heads),
    }


def mask(step: np.ndarray) -> np.ndarray:
    """0 where a row sees another one, else minus infinity, float32 [1 1 n n].

    Raises:
      ValueError: more rows than any of these models has.
    """
    if len(step) > LONGEST:
        raise ValueError(f"the file has places for {len(step)} tokens; no more than {LONGEST} are read")
    return np.where(step[:, None] >= step, 0, -np.inf).astype(np.float32)[None, None]


def fills(module: Causal) -> dict[str, np.ndarray]:
    """Contents of the buffers."""
    head = module.head
    sizes = (head.depth, head.width, head.heads or head.width // 64)
    of_head = {
        "flownet.res_blocks.{}.attn": sizes,
        **({"flownet.res_blocks.{}.crossattn": sizes} if head.cross else {}),
    }
    return {"mask": mask(module.spec.coords[:, 0]), **frequencies(stacks(module.backbone) | of_head)}


def buffers(module: Causal, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """What follows from the scales and the sizes."""
    return {key: value.shape for key, value in fills(module).items()}


def words(net: EncoderDecoder) -> str:
    return f"{net.layers}+{net.decoder_layers or net.layers} layers of width {net.width} with {net.heads} heads"


def describe(module: Causal) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    head, scales = module.head, " ".join(str(height) for height, _ in module.spec.scales)
    text = (
        f"{words(module.backbone)}, flow head of {head.depth} layers of width {head.width}, scales {scales} of "
        f"{head.channels} numbers, {module.conditioning.classes} classes"
    )
    guidance = EVALUATED.get(module.backbone.width, (0.0,))[0]
    sampling = codec.encode(Sampling(Ramp(guidance)))
    return text, Info(classes=module.conditioning.classes), {"order": codec.encode(scale_order), "sampling": sampling}
