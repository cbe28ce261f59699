"""Hi-MAR's released checkpoints: the masked transformers with both heads, and MAR's tokenizer for images of two sizes."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from ar_jax.convert import mar
from ar_jax.convert.names import CONV1, PLAIN, Layout, Rule, count, qkv_layout
from ar_jax.data import Info
from ar_jax.decode.sampling import Sampling
from ar_jax.files import codec
from ar_jax.generators.himar import TASKS, ByResolution, HiMar, Resolutions, TaskViT
from ar_jax.heads.diffusion import Diffusion
from ar_jax.heads.joint_diffusion import JointDiffusion
from ar_jax.nets.conditioning import Label
from ar_jax.tokenizers.image_pyramid import ImagePyramid
from ar_jax.tokens import TokenSpec, pyramid, sides

Shapes = Mapping[str, tuple[int, ...]]

FIXED = set()  # all parameters are trained
AVERAGED = ("generator",)
# as evaluated, by width: guidance, that of the pivots, steps
EVALUATED = {768: (2.5, 2.7, 4), 1024: (3.5, 3.5, 4), 1280: (3.2, 5.5, 12)}
NET = "cond_diffloss.net."

ROW = Layout(lambda x: x[None], lambda x: x[0])
BOTH = Layout(lambda x: x.reshape(1, -1, x.shape[-1]), lambda x: x.reshape(TASKS, -1, x.shape[-1]))
SPREAD = Layout(lambda x: x[:, None, None], lambda x: x[:, 0, 0])


def generator_rules(generator: HiMar) -> list[Rule]:
    found = [
        ("mask_token", "mask_token", BOTH),
        ("placeholder", "cond_tokens", ROW),
        (r"(encoder|decoder)_positions", r"\1_pos_embed_learned", BOTH),
        *mar.layers("", "", (("pivot_input", "cond_proj"), ("told_input", "cond_z_proj"))),
    ]
    for net in ("encoder", "decoder"):
        found += [
            (f"{net}/task", f"{net}_task_emb.weight", PLAIN),
            (f"{net}/blocks/task_(scale|shift)", rf"{net}_blocks.{{}}.adaLN_\1", SPREAD),
            *mar.layers(f"{net}/", f"{net}_", (("ada", "blocks_ada.1"),)),
        ]
    for ours, theirs in (("input", "x"), ("condition", "c")):
        found += [
            (f"joint_head/net/{ours}/kernel", f"{NET}{theirs}_embedder.proj.weight", CONV1),
            (f"joint_head/net/{ours}/bias", f"{NET}{theirs}_embedder.proj.bias", PLAIN),
        ]
    heads, ours, theirs = generator.joint_head.heads, "joint_head/net/blocks/", f"{NET}blocks.{{}}."
    return [
        *found,
        *mar.generator_rules(generator),
        *mar.layers("joint_head/net/", NET, (
            ("time/fc1", "t_embedder.mlp.0"), ("time/fc2", "t_embedder.mlp.2"), ("output", "final_layer.linear"),
            ("modulation", "final_layer.adaLN_modulation.1"),
        )),
        (f"{ours}qkv/kernel", f"{theirs}attn.qkv.weight", qkv_layout(heads)),
        (f"{ours}qkv/bias", f"{theirs}attn.qkv.bias", mar.qkv_bias(heads)),
        *mar.layers(ours, theirs, (
            ("out", "attn.proj"), ("fc1", "mlp.fc1"), ("fc2", "mlp.fc2"), ("modulation", "adaLN_modulation.1"),
        )),
    ]  # fmt: skip


def generator(shapes: Shapes, heads: int = 0) -> HiMar:
    """The transformer whose state dict has these keys and shapes.

    Args:
      heads: of the transformer; 0 takes the published number for the width.
    """
    (_, n, _), (_, p, channels) = shapes["diffusion_pos_embed_learned"], shapes["cond_tokens"]
    (_, rows, wide), (classes, width) = shapes["encoder_pos_embed_learned"], shapes["class_emb.weight"]
    of_others = {**shapes, "encoder_pos_embed_learned": (1, rows // TASKS - p, wide)}
    encoder, decoder, buffer, side = mar.networks(of_others, n - p, heads)
    few = round(p**0.5)
    if few**2 != p:
        raise ValueError(f"the file has {p} pivots, which make no square")

    def net(plain):
        fields = {field: getattr(plain, field) for field in plain.__dataclass_fields__ if field not in ("parent", "name")}
        return TaskViT(**fields)

    head = Diffusion(shapes["diffloss.net.input_proj.weight"][0], count(shapes, r"diffloss\.net\.res_blocks\.(\d+)\."))
    joint = shapes[f"{NET}x_embedder.proj.weight"][0]
    joint = JointDiffusion(joint, count(shapes, r"cond_diffloss\.net\.blocks\.(\d+)\."), joint // 64 or encoder.heads)
    module = HiMar(net(encoder), net(decoder), Label(width, apart=True), head, joint, buffer)
    return module.complete(TokenSpec(pyramid((few, side)), channels=channels), Info(classes=classes))


def recognise(shapes: Shapes) -> str:
    """ "tokenizer", "generator" or "" for files of others, judged by a few keys; `build` may yet fail.

    MAR, which comes before, takes all tokenizers where nobody asks for this family.
    """
    if f"{NET}x_embedder.proj.weight" in shapes:
        return "generator"
    return "tokenizer" if mar.recognise(shapes) == "tokenizer" else ""


def build(kind: str, shapes: Shapes, *, size: int, heads: int, groups: int, scales: tuple[int, ...]) -> nn.Module:
    """The network of a file; the arguments are those of `llamagen.build`. `scales` of a tokenizer are two, pivots first."""
    if kind == "generator":
        return generator(shapes, heads)
    if len(scales) != TASKS:
        raise ValueError(f"--scales is {scales or 'not given'}; give the sides of pivots and tokens, such as --scales 8 16")
    base = mar.build(kind, shapes, size=size, heads=heads, groups=groups, scales=())
    if sides(scales[-1]) != base.grid:
        raise ValueError(f"--scales is {scales}, but the last one must be the grid of the image's tokens, {base.grid}")
    return ImagePyramid(base, scales)


def describe(module: nn.Module) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    few, many = module.spec.scales
    if isinstance(module, ImagePyramid):
        return f"{mar.describe(module.base)[0]}, and {few[0]}x{few[1]} of a smaller image", Info(), {}
    net = module.encoder
    weight, pivots, steps = EVALUATED.get(net.width, (1.0, 1.0, 4))
    words = (
        f"{net.layers}+{module.decoder.layers} layers of width {net.width} with {net.heads} heads, {few[0]}x{few[1]} pivots and "
        f"{many[0]}x{many[1]} tokens of {module.spec.channels} numbers, {module.conditioning.classes} classes"
    )
    settings = {"order": codec.encode(Resolutions(steps)), "sampling": codec.encode(Sampling(ByResolution(weight, pivots)))}
    return words, Info(classes=module.conditioning.classes), settings


def fills(module: nn.Module) -> dict[str, np.ndarray]:
    """Vectors of the places, which the network computes; the other table is of no use."""
    if isinstance(module, ImagePyramid):
        return {}
    count = module.spec.n - module.pivots
    places = np.asarray(module.joint_head.places(np.arange(count, dtype=np.int32)[None]))
    return {f"{NET}pos_embed": places, f"{NET}c_pos_embed": np.zeros_like(places)}


def buffers(module: nn.Module, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    if isinstance(module, ImagePyramid):
        return mar.buffers(module.base, shapes)
    return {key: value.shape for key, value in fills(module).items()}


def rules(module: nn.Module) -> list[Rule]:
    """Names of a network's parameters in the released files.

    Raises:
      ValueError: Hi-MAR has no such network.
    """
    if type(module) is ImagePyramid:
        return mar.rules(module.base)
    if type(module) is not HiMar or not getattr(module.conditioning, "apart", False):
        raise ValueError(f"Hi-MAR has no {type(module).__name__}")
    return generator_rules(module)
