"""Meissonic's released transformers."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from ar_jax.convert.mar import layers
from ar_jax.convert.names import CONV1, PLAIN, Layout, Rule, count
from ar_jax.data import Info
from ar_jax.decode.guidance import Interval
from ar_jax.decode.sampling import Sampling
from ar_jax.files import codec
from ar_jax.generators.meissonic import Meissonic, Prompt
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.multimodal import MultiModal
from ar_jax.orders import Confident
from ar_jax.tokens import TokenSpec, grid

Shapes = Mapping[str, tuple[int, ...]]

FIXED = set()  # all parameters are trained
AVERAGED = ()  # the published pipeline loads what was trained
ROWS = 78  # of the text, and the vector after them; not in the file
PIXELS = 16  # a code's side
MICRO = 5 * 256  # sines of the micro-conditions
STEPS, GUIDANCE = 64, 9.0
NAMES = "down_block.downsample.Conv2d_0.", "down_block.downsample.conv."  # one tensor under two names
JOIN = Layout(lambda x: x.T.reshape(x.shape[1], -1, 2, 2), lambda x: x.reshape(len(x), -1).T)  # their convolution of 2x2
PART = Layout(lambda x: x.reshape(len(x), -1, 2, 2), lambda x: x.reshape(len(x), -1))  # and the transposed one
ASKS = (
    ("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("query_norm", "norm_q"), ("key_norm", "norm_k"),
)  # fmt: skip
TEXT_ASKS = (
    ("query", "add_q_proj"), ("key", "add_k_proj"), ("value", "add_v_proj"), ("query_norm", "norm_added_q"),
    ("key_norm", "norm_added_k"),
)  # fmt: skip


def rules(module: nn.Module) -> list[Rule]:
    """Names of the network's parameters in the released file.

    Raises:
      ValueError: Meissonic has no such network.
    """
    if type(module) is not Meissonic or type(module.conditioning) is not Prompt:
        raise ValueError(f"Meissonic has no {type(module).__name__}")
    double, single = "transformer_blocks.{}.", "single_transformer_blocks.{}."
    found = [
        ("embedding", "embed.embeddings.weight", PLAIN),
        ("join/kernel", f"{NAMES[1]}weight", JOIN),
        ("part/kernel", "up_block.upsample.conv.weight", PART),
    ]
    for ours, theirs in (("token", "embed.conv"), ("head_input", "mlm_layer.conv1"), ("head/readout", "mlm_layer.conv2")):
        found.append((f"{ours}/kernel", f"{theirs}.weight", CONV1))
    found += layers("", "", (
        ("token_norm", "embed.layer_norm"), ("join_norm", "down_block.downsample.norm"),
        ("part_norm", "up_block.upsample.norm"), ("input_norm", "project_to_hidden_norm"), ("input", "project_to_hidden"),
        ("output_norm", "project_from_hidden_norm"), ("output", "project_from_hidden"),
        ("head_norm", "mlm_layer.layer_norm"), ("conditioning/norm", "encoder_proj_layer_norm"),
        ("conditioning/text", "context_embedder"), ("conditioning/fc1", "cond_embed.linear_1"),
        ("conditioning/fc2", "cond_embed.linear_2"), ("conditioning/fc3", "time_text_embed.text_embedder.linear_1"),
        ("conditioning/fc4", "time_text_embed.text_embedder.linear_2"),
        ("backbone/time/fc1", "time_text_embed.timestep_embedder.linear_1"),
        ("backbone/time/fc2", "time_text_embed.timestep_embedder.linear_2"),
    ))  # fmt: skip
    for ours, asks, rest in (
        ("image/", ASKS, (("modulation", "norm1.linear"), ("out", "attn.to_out.0"), ("fc1", "ff.net.0.proj"), ("fc2", "ff.net.2"))),
        ("text/", TEXT_ASKS, (
            ("modulation", "norm1_context.linear"), ("out", "attn.to_add_out"), ("fc1", "ff_context.net.0.proj"),
            ("fc2", "ff_context.net.2"),
        )),
    ):  # fmt: skip
        found += layers(f"backbone/double/{ours}attention/", f"{double}attn.", asks) + layers(f"backbone/double/{ours}", double, rest)
    found += layers("backbone/single/attention/", f"{single}attn.", ASKS)
    return found + layers(
        "backbone/single/", single, (("modulation", "norm.linear"), ("fc1", "proj_mlp"), ("out", "proj_out"))
    )


def recognise(shapes: Shapes) -> str:
    """ "generator" or "" for files of others, judged by a few keys; `build` may yet fail."""
    return "generator" if {"mlm_layer.conv2.weight", "cond_embed.linear_1.weight"} <= shapes.keys() else ""


def spelled(weights: Mapping[str, Any]) -> dict[str, Any]:
    """A tensor that lies in a file under two names, or under the one that others leave out, by one name."""
    first = {key.replace(*NAMES): value for key, value in weights.items() if key.startswith(NAMES[0])}
    return first | {key: value for key, value in weights.items() if not key.startswith(NAMES[0])}


def build(kind: str, shapes: Shapes, *, size: int, heads: int, groups: int, scales: tuple[int, ...]) -> nn.Module:
    """The network of a file for images of a size, 0 is 1024, or 512 where places are not joined; others as of `llamagen.build`."""
    width, features = shapes["context_embedder.weight"]
    (each,), joined = shapes["transformer_blocks.0.attn.norm_q.weight"], "down_block.downsample.norm.weight" in shapes
    backbone = MultiModal(
        count(shapes, r"transformer_blocks\.(\d+)\."), width, width // each, axes=axes_of(each),
        singles=count(shapes, r"single_transformer_blocks\.(\d+)\."),
        hidden=shapes["transformer_blocks.0.ff.net.2.weight"][1],
    )  # fmt: skip
    side, rest = divmod(size or (1024 if joined else 512), PIXELS)
    if rest or not side or (joined and side % 2):
        raise ValueError(f"--size is {size}; this Meissonic needs a multiple of {PIXELS * (1 + joined)} pixels")
    pooled = shapes["cond_embed.linear_1.weight"][1] - MICRO
    if pooled < 1:
        raise ValueError(f"cond_embed.linear_1.weight takes {pooled + MICRO} numbers, which are no vector beside {MICRO} of sines")
    prompt = Prompt(width, pooled=0 if pooled == features else pooled, micro=(*(float(PIXELS * side),) * 2, 0.0, 0.0, 6.0))
    module = Meissonic(
        backbone, prompt, Categorical(), joined=joined, clock="steps", vocabulary=shapes["embed.embeddings.weight"][0]
    )
    codes = shapes["mlm_layer.conv2.weight"][0]
    info = Info(captions=True, text_rows=ROWS, text_width=features)
    return module.complete(TokenSpec(grid(side, side), codes=(codes,)), info)


def axes_of(features: int) -> tuple[int, int, int]:
    """Channels of a head by axis: an eighth for the level, the others for rows and columns alike."""
    level = features // 32 * 4
    return level, (features - level) // 2, (features - level) // 2


def describe(module: Meissonic) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    net, text, (rows, columns) = module.backbone, module.conditioning, module.spec.scales[0]
    words = (
        f"{net.layers} double and {net.singles} single layers of width {net.width} with {net.heads} heads, {rows}x{columns} tokens "
        f"with {module.spec.codes[0]} codes, {text.rows} rows of text of {text.features} numbers"
    )
    info = Info(captions=True, text_rows=text.rows, text_width=text.features)
    settings = Confident(min(STEPS, module.spec.n)), Sampling(Interval(GUIDANCE))
    return words, info, dict(zip(("order", "sampling"), map(codec.encode, settings)))
