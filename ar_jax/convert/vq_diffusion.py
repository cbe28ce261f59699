"""VQ-Diffusion's released denoisers, of captions and of classes, those trained for guidance too. Their tokenizers are not read."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from ar_jax.convert.mar import layers
from ar_jax.convert.names import CONV, PLAIN, Rule, count
from ar_jax.data import Info
from ar_jax.decode.guidance import Interval
from ar_jax.decode.logits import Filter
from ar_jax.decode.sampling import Sampling
from ar_jax.files import codec
from ar_jax.generators.binary_diffusion import Denoised
from ar_jax.generators.code_diffusion import CodeDiffusion
from ar_jax.generators.corruption import MaskAndReplace
from ar_jax.nets.code_transformer import CodeTransformer
from ar_jax.nets.conditioning import Classes, Features
from ar_jax.tokens import TokenSpec, grid

Shapes = Mapping[str, tuple[int, ...]]

HEADS = 16  # of all released models; not in the file
ROWS = 77  # of CLIP's captions
PATCH = 16  # pixels a code of the models of classes, whose number of tokens is not in the file
FIXED = set()  # all parameters are trained
BESIDE = ("content_codec.", "condition_emb.", "condition_codec.")  # the tokenizer, CLIP and its vocabulary
EMPTY = "empty_text_embed"
TABLE = "transformer.content_emb.emb.weight"
ATTENTION = (("query", "query"), ("key", "key"), ("value", "value"), ("out", "proj"))
# weights of guidance and filters, as published: not trained for it, trained for it, of classes trained for it
PUBLISHED = {"plain": (1.0, 0.86), "captions": (3.0, 1.0), "wide": (5.0, 1.0), "classes": (1.5, 0.94)}


def generator_rules(generator: CodeDiffusion) -> list[Rule]:
    net, ours, theirs = generator.backbone, "backbone/blocks/", "transformer.blocks.{}."
    own = "attn1." if net.cross else "attn."
    norms = [("attention_norm", "ln1"), *([("text_norm", "ln1_1")] if net.cross else [("mlp_norm", "ln2")])]
    pairs = [
        *((our, own + their) for our, their in ATTENTION),
        *((f"text_{our}", f"attn2.{their}") for our, their in ATTENTION),
        *((f"{our}/linear", f"{their}.linear") for our, their in norms),
        *(("mlp_norm", "ln2"), ("fc1", "mlp.0"), ("fc2", "mlp.2")),
    ]
    return [
        ("conditioning/empty", EMPTY, PLAIN),
        ("backbone/embedding", TABLE, PLAIN),
        ("backbone/rows", "transformer.content_emb.height_emb.weight", PLAIN),
        ("backbone/columns", "transformer.content_emb.width_emb.weight", PLAIN),
        *((f"{ours}{our}/table", f"{theirs}{their}.emb.weight", PLAIN) for our, their in norms),
        (rf"{ours}(conv\d)/kernel", theirs + r"mlp.\1.weight", CONV),
        (rf"{ours}(conv\d)/bias", theirs + r"mlp.\1.bias", PLAIN),
        *layers(ours, theirs, tuple(pairs)),
        *layers("backbone/", "transformer.", (("norm", "to_logits.0"), ("readout", "to_logits.1"))),
    ]


def recognise(shapes: Shapes) -> str:
    """ "generator" or "" for files of others, judged by a few keys; `build` may yet fail."""
    return "generator" if {TABLE, "transformer.to_logits.1.weight"} <= shapes.keys() else ""


def build(
    kind: str, shapes: Shapes, *, size: int, heads: int, groups: int, scales: tuple[int, ...]
) -> nn.Module:  # fmt: skip
    """The network of a file; the arguments are those of `llamagen.build`.

    Raises:
      ValueError: it has places for another number of tokens.
      KeyError: a key is missing.
    """
    codes, width = shapes["transformer.to_logits.1.weight"]
    places = tuple(shapes[f"transformer.content_emb.{side}_emb.weight"][0] for side in ("height", "width"))
    first, cross = "transformer.blocks.0.", "transformer.blocks.0.attn2.key.weight" in shapes
    conv = f"{first}mlp.conv1.weight" in shapes
    if cross:
        n, side = shapes[f"{first}attn2.mask"][-1], places
    else:
        side = ((size or 256) // PATCH,) * 2
        n = side[0] * side[1]
    if (cross and n != places[0] * places[1]) or n > places[0] * places[1]:
        raise ValueError(f"the file has places for {places[0]}x{places[1]} tokens, but there are {n}")
    times = shapes[f"{first}ln1.emb.weight"][0]
    net = CodeTransformer(
        count(shapes, r"transformer\.blocks\.(\d+)\."), width, heads or HEADS, mlp="grid" if conv else "rows", cross=cross,
        hidden=shapes[f"{first}mlp.conv1.weight" if conv else f"{first}mlp.0.weight"][0], places=places,
    )  # fmt: skip
    if cross:
        learned = EMPTY in shapes
        rows, features = shapes[EMPTY] if learned else (ROWS, shapes[f"{first}attn2.key.weight"][1])
        conditioning, info = Features(learned), Info(captions=True, text_rows=rows, text_width=features)
    else:
        classes = shapes[f"{first}ln2.emb.weight"][0]
        none = classes != 1000  # ImageNet's; those trained for guidance have one more
        conditioning, info = Classes(none), Info(classes=classes - none)
    module = CodeDiffusion(net, conditioning, MaskAndReplace(times), aux=5e-4 if cross else 1e-3, weigh_times=True)
    return module.complete(TokenSpec(grid(*side), codes=(codes,)), info)


def buffers(module: CodeDiffusion, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Masks that hide nothing, the process, and what training remembers."""
    found = {key: value.shape for key, value in fills(module).items()}
    return found | {key: (module.process.times,) for key in ("Lt_history", "Lt_count")}


def fills(module: CodeDiffusion) -> dict[str, np.ndarray]:
    """The masks, and the logarithms of the process."""
    net, every = module.backbone, np.arange(module.process.times)
    step = module.process.rates(module.codes, every, every - 1)
    whole = module.process.rates(module.codes, np.append(every, -1))
    mask = np.tril(np.ones((1, 1, module.spec.n, module.spec.n), np.float32))
    masks = {f"transformer.blocks.{i}.attn2.mask": mask for i in range(net.layers if net.cross else 0)}
    return masks | {
        "log_at": step.keep, "log_bt": step.replace, "log_ct": step.hide, "log_1_min_ct": step.show,
        "log_cumprod_at": whole.keep, "log_cumprod_bt": whole.replace, "log_cumprod_ct": whole.hide,
        "log_1_min_cumprod_ct": whole.show,
    }  # fmt: skip


def published(module: CodeDiffusion) -> Sampling:
    """How the authors draw with a model."""
    if isinstance(module.conditioning, Classes):
        kind = "classes" if module.conditioning.none else "plain"
    else:
        kind = ("wide" if module.backbone.width > 1024 else "captions") if module.conditioning.learned else "plain"
    weight, kept = PUBLISHED[kind]
    return Sampling(Interval(weight), filter=Filter(top_p=kept))


def describe(module: CodeDiffusion) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    net, told, (rows, columns) = module.backbone, module.conditioning, module.spec.scales[0]
    if net.cross:
        words, info = "captions", Info(captions=True, text_rows=told.rows, text_width=told.features)
    else:
        words, info = f"{told.classes} classes", Info(classes=told.classes)
    settings = {"order": codec.encode(Denoised(module.process.times)), "sampling": codec.encode(published(module))}
    sizes = f"{net.layers} layers of width {net.width} with {net.heads} heads"
    return f"{sizes}, {rows}x{columns} tokens of {module.codes} codes, {words}", info, settings


def rules(module: nn.Module) -> list[Rule]:
    """Names of a network's parameters in the released files.

    Raises:
      ValueError: VQ-Diffusion has no such network.
    """
    known = type(module) is CodeDiffusion and type(module.backbone) is CodeTransformer
    if not known or type(module.process) is not MaskAndReplace or type(module.conditioning) not in (Classes, Features):
        raise ValueError(f"VQ-Diffusion has no such {type(module).__name__}")
    return generator_rules(module)
