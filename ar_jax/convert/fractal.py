"""FractalGen's released generators: level by level the same names, each level's after the word next_fractal."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from ar_jax.convert import mar
from ar_jax.convert.names import PLAIN, Layout, Rule, count, qkv_layout
from ar_jax.data import Info
from ar_jax.decode.guidance import Linear, Rising
from ar_jax.decode.sampling import Sampling
from ar_jax.decode.temperature import Constant
from ar_jax.files import codec
from ar_jax.generators.causal import Causal
from ar_jax.generators.fractal import Infilling, Inside, PreviousPatch
from ar_jax.heads.colours import Colours
from ar_jax.nets.conditioning import Label
from ar_jax.nets.fractal import Enclosed, Entered, FromAbove, Repeated
from ar_jax.nets.vit import ClipViT
from ar_jax.orders import Shuffled, raster
from ar_jax.tokenizers.pixels import VALUES, patch_of
from ar_jax.tokens import TokenSpec, grid

FIXED = set()  # all parameters are trained
AVERAGED = ()  # no average is kept
NEXT = "next_fractal."
HEADS = {1280: 16, 1024: 16, 768: 12, 640: 8, 512: 8, 384: 6, 320: 4, 256: 4, 192: 3, 128: 4, 64: 4}  # by width; not in the file
STEPS = 64, 16  # of masked generators: above all, and of every one inside
# by kind, widths, and whether there are mean colours: the guidance's end and what logits are multiplied with
EVALUATED = {
    (Causal, (1024, 512), False): (11.0, 1.03),
    (Infilling, (1024, 512), False): (6.5, 1.02),
    (Infilling, (768, 384, 192), True): (29.0, 1.1),
    (Infilling, (1024, 512, 256), True): (21.0, 1.1),
    (Infilling, (1280, 640, 320), True): (19.0, 1.1),
}

Shapes = Mapping[str, tuple[int, ...]]
ROW = Layout(lambda x: x[None], lambda x: x[0])
TOKEN = Layout(lambda x: x[None, None], lambda x: x[0, 0])


def colour_rules(ours: str, theirs: str, head: Colours) -> list[Rule]:
    """Names of a predictor of pixels."""
    return [
        *(rule for j, name in enumerate("rgb") for rule in (
            (f"{ours}readouts_{j}/embedding", f"{theirs}{name}_codebook.weight", PLAIN),
            (f"{ours}readouts_{j}/offset", f"{theirs}{name}_mlm.bias", ROW),
        )),
        *mar.layers(ours, theirs, (("condition", "cond_proj"), ("net/before", "ln"), ("net/norm", "norm"))),
        *mar.layer_rules(f"{ours}net/blocks", f"{theirs}blocks", head.net.heads),
    ]  # fmt: skip


def level_rules(ours: str, theirs: str, generator: nn.Module) -> list[Rule]:
    """Names of a generator and of those inside."""
    name, heads, head = f"{theirs}generator.", generator.backbone.heads, generator.head
    rules = mar.layers(f"{ours}conditioning/", name, (("projection", "cond_emb"), ("colour_projection", "pix_proj")))
    rules += mar.layers(f"{ours}backbone/", name, (("before", "patch_emb_ln"), ("norm", "norm")))
    if isinstance(generator, Causal):
        block, blocks = f"{ours}backbone/blocks/", f"{name}blocks.{{}}."
        rules += [
            *mar.layers(ours, name, (("inputs/projection", "patch_emb"),)),
            (f"{ours}backbone/positions", f"{name}pos_embed_learned", ROW),
            (f"{block}qkv/kernel", f"{blocks}attention.wqkv.weight", qkv_layout(heads)),
            *mar.layers(block, blocks, (
                ("attention_norm", "attention_norm"), ("mlp_norm", "ffn_norm"), ("out", "attention.wo"),
                ("gate", "feed_forward.w1"), ("up", "feed_forward.w3"), ("down", "feed_forward.w2"),
            )),
        ]  # fmt: skip
    else:
        rules += [
            *mar.layers(ours, name, (("input", "patch_emb"),)),
            (f"{ours}positions", f"{name}pos_embed_learned", ROW),
            (f"{ours}mask_token", f"{name}mask_token", TOKEN),
            *mar.layer_rules(f"{ours}backbone/blocks", f"{name}blocks", heads),
        ]
    if isinstance(head, Colours):
        return rules + colour_rules(f"{ours}head/", theirs + NEXT, head)
    if head.guide:
        rules += colour_rules(f"{ours}head/guide/", f"{theirs}{NEXT}generator.guiding_pixel_loss.", head.guide)
    return rules + level_rules(f"{ours}head/generator/", theirs + NEXT, head.generator)


def rules(module: nn.Module) -> list[Rule]:
    """Names of a network's parameters in the released file.

    Raises:
      ValueError: FractalGen has no such network.
    """
    if not isinstance(getattr(module, "head", None), Inside | Colours):
        raise ValueError(f"FractalGen has no {type(module).__name__}")
    return [
        ("conditioning/label/embedding", "class_emb.weight", PLAIN),
        ("conditioning/label/none", "fake_latent", PLAIN),
        *level_rules("", "", module),
    ]


def recognise(shapes: Shapes) -> str:
    """ "generator" or "" for files of others, judged by a few keys; `build` may yet fail."""
    return "generator" if {"fake_latent", "generator.pos_embed_learned", "generator.cond_emb.weight"} <= shapes.keys() else ""


def build(kind: str, shapes: Shapes, *, size: int, heads: int, groups: int, scales: tuple[int, ...]) -> nn.Module:
    """The network of a file; the arguments are those of `llamagen.build`. All but `heads` are unused.

    Raises:
      ValueError: something is needed that neither the file nor the caller knows.
      KeyError: a key is missing.
    """
    levels, prefix = [], ""
    while f"{prefix}generator.patch_emb.weight" in shapes:
        levels, prefix = [*levels, f"{prefix}generator."], prefix + NEXT
    sides = [round((shapes[f"{level}patch_emb.weight"][1] / 3) ** 0.5) for level in levels]  # of the patches of each

    def sizes(name):
        width = shapes[name][0]
        number = heads or HEADS.get(width, 0)
        if not number:
            raise ValueError(f"the file does not hold the number of heads and width {width} is not published; give --heads")
        return width, number

    def colours(name):
        width, number = sizes(f"{name}cond_proj.weight")
        layers = count(shapes, rf"{name.replace('.', '[.]')}blocks\.(\d+)\.")
        return Colours(Enclosed(layers, width, number, hidden=shapes[f"{name}blocks.0.mlp.fc1.weight"][0], dropout=0.1, attention_dropout=0.1))

    masked, guided = ([f"{level}{name}" in shapes for level in levels] for name in ("mask_token", "pix_proj.weight"))

    def vectors(i):
        """How many are read of those handed on: rows before the patches inside; above all, as many as inside."""
        if not masked[i]:
            return 1
        if i:
            return shapes[f"{levels[i]}pos_embed_learned"][1] - (sides[i - 1] // sides[i]) ** 2 - guided[i]
        return next((vectors(j) for j in range(1, len(levels)) if masked[j]), 5)

    head = colours(prefix)
    for i, level in reversed(list(enumerate(levels))):
        width, number = sizes(f"{level}patch_emb.weight")
        layers = count(shapes, rf"{level.replace('.', '[.]')}blocks\.(\d+)\.")
        given = FromAbove(width, vectors(i), guided[i]) if i else Repeated(Label(width, apart=True), vectors(i))
        if masked[i]:
            hidden = shapes[f"{level}blocks.0.mlp.fc1.weight"][0]
            net = ClipViT(layers, width, number, hidden=hidden, dropout=0.1, attention_dropout=0.1, eps=1e-6)
            module = Infilling(net, given, head)
        else:
            net = Entered(layers, width, number, hidden=shapes[f"{level}blocks.0.feed_forward.w1.weight"][0], dropout=0.1)
            module = Causal(net, given, head, PreviousPatch())
        if i:
            guide = colours(f"{level}guiding_pixel_loss.") if guided[i] else None
            head = Inside(module, sides[i], Shuffled(STEPS[1]) if masked[i] else raster, guide)
    n = shapes["generator.pos_embed_learned"][1] - vectors(0)
    across = round(n**0.5)
    if across**2 != n:
        raise ValueError(f"the file has places for {n} patches, which make no square")
    spec = TokenSpec(grid(across, across), codes=(VALUES,) * (3 * sides[0] ** 2))
    return module.complete(spec, Info(classes=shapes["class_emb.weight"][0]))


def levels_of(module: nn.Module) -> list[nn.Module]:
    """A generator and those inside, from above."""
    return [module, *(levels_of(module.head.generator) if isinstance(module.head, Inside) else ())]


def describe(module: nn.Module) -> tuple[str, Info, dict[str, Any]]:
    """A sentence about a network that `build` made, what it knows of its data, and settings of its model folder."""
    levels, classes = levels_of(module), module.conditioning.label.classes
    masked, guided = isinstance(module, Infilling), isinstance(module.head, Inside) and module.head.guide is not None
    each = " inside ".join(
        f"{level.spec.scales[0][0]}x{level.spec.scales[0][1]} by {level.backbone.layers} layers of width {level.backbone.width}"
        for level in reversed(levels)
    )
    side = patch_of(module.spec.codes)[1] * module.spec.scales[0][0]
    kind = "masked" if masked else "causal"
    words = f"{len(levels)} {kind} generators of {side}x{side} pixels, {each}, {classes} classes"
    if guided:
        words += ", mean colours first"
    weight, factor = EVALUATED.get((type(module), tuple(level.backbone.width for level in levels), guided), (1.0, 1.0))
    sampling = Sampling((Linear if masked else Rising)(weight), Constant(1 / factor))
    order = Shuffled(min(STEPS[0], module.spec.n)) if masked else raster
    return words, Info(classes=classes), {"order": codec.encode(order), "sampling": codec.encode(sampling)}
