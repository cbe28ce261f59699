"""Every method as one tiny line; `test_laws.py` runs all laws on each."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from trees import random_params

from ar_jax.data import Info
from ar_jax.generators.causal import Causal
from ar_jax.generators.coarse_to_fine import CoarseFirst, CoarseToFine
from ar_jax.generators.detailflow import Grouped, Groups
from ar_jax.generators.flashar import Fused
from ar_jax.generators.fractal import Inside, PreviousPatch
from ar_jax.generators.hita import ByLevel, Holistic, TwoTables
from ar_jax.generators.hmar import Hmar
from ar_jax.generators.inputs import Bits, Joined, NextScale, Previous, Upsampled
from ar_jax.generators.nar import Branched, ByAxis, Neighbouring
from ar_jax.generators.rar import Aimed, Placed, StartLabel
from ar_jax.generators.token_shuffle import Merged, NextCell
from ar_jax.generators.vf_prompt import PromptCodes, Prompted
from ar_jax.heads.bitwise import Bitwise
from ar_jax.heads.by_dimension import Dimensions
from ar_jax.heads.categorical import Categorical
from ar_jax.heads.colours import Colours
from ar_jax.heads.factorised import Factorised
from ar_jax.nets.adaln import AdaLN
from ar_jax.nets.conditioning import Caption, Label, Start
from ar_jax.nets.fractal import Enclosed, Entered, FromAbove, Repeated
from ar_jax.nets.modulated import Modulated
from ar_jax.nets.post_norm import PostNorm
from ar_jax.nets.reader import LayeredCaption, Reader
from ar_jax.nets.transformer import Positioned, Transformer
from ar_jax.orders import Cells, Diagonals, Order, raster, scales
from ar_jax.tokenizers.bit_pyramid import BitPyramid
from ar_jax.tokenizers.clustered import Clustered
from ar_jax.tokenizers.pyramid import Pyramid
from ar_jax.tokenizers.residual_pyramid import ResidualPyramid
from ar_jax.tokenizers.tokenflow import PatchViT, TokenFlow
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.tokens import Grammar, TokenSpec, grid, pyramid

SPEC = TokenSpec(grid(3, 4), codes=(12,))
INFO = Info(classes=3, captions=True, text_rows=4, text_width=6)


def backwards(spec, key=None, images=1, train_step=0):
    """A fixed order other than raster."""
    return Order(np.arange(spec.n, dtype=np.int32)[None, ::-1].copy(), (1,) * spec.n)


def shuffled(spec, key=None, images=1, train_step=0):
    """An order per image."""
    random = np.random.default_rng(0)
    return Order(np.stack([random.permutation(spec.n) for _ in range(images)]).astype(np.int32), (1,) * spec.n)


@dataclasses.dataclass(frozen=True)
class Case:
    generator: Causal
    order: Callable = raster
    images: int = 4
    pyramid: Any = None

    @functools.cached_property
    def params(self):
        """Random everywhere: zero-initialised readouts would make the laws hold trivially."""
        return random_params(self.generator, 0.3)

    @functools.cached_property
    def tokenizer(self):
        """The frozen tokenizer's methods as one function, or None."""
        if self.pyramid is None:
            return None
        return functools.partial(self.pyramid.apply, {"params": random_params(self.pyramid, 0.5, seed=7)})

    @functools.cached_property
    def tokens(self):
        random, spec = np.random.default_rng(2), self.generator.spec
        return random.integers(spec.codes[0], size=(self.images, spec.n, len(spec.codes))).astype(np.int32)

    @functools.cached_property
    def batch(self):
        random = np.random.default_rng(3)
        mask = np.array([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]], bool)[: self.images]
        text = random.normal(size=(*mask.shape, 6)).astype(np.float32) * mask[..., None]
        return {"label": np.arange(self.images, dtype=np.int32) % 3, "text": text, "text_mask": mask}


@dataclasses.dataclass(frozen=True)
class Clusters(Case):
    """Tokens are clusters of codes and then the codes, each of which lies in its cluster."""

    cluster: tuple[int, ...] = ()

    @functools.cached_property
    def tokenizer(self):
        params = random_params(self.pyramid.base, 0.5, seed=7) | {"cluster": np.array(self.cluster, np.int32)}
        return functools.partial(self.pyramid.apply, {"params": params})

    @functools.cached_property
    def tokens(self):
        fine = np.random.default_rng(2).integers(12, size=(self.images, self.generator.spec.n // 2, 1)).astype(np.int32)
        return np.concatenate([np.array(self.cluster, np.int32)[fine], fine], axis=1)


def _causal(conditioning, order=raster, head=Categorical(), **backbone):
    net = Transformer(layers=2, width=16, heads=2, hidden=24, **backbone)
    return Case(Causal(net, conditioning, head).complete(SPEC, INFO), order)


def _scales(tokenizer, inputs=NextScale(channels=4), sees="past", head=Categorical(bias=True, std=0.02), **fields):
    def net(layers, final=True):
        return AdaLN(layers, 16, 2, hidden=24, sees=sees, final=final, gate=0.5, **fields)

    if sees == "past":
        generator = Causal(net(2), Label(16), head, inputs)
    else:
        generator = Hmar(
            net(2, final=False), Label(16), head, inputs, emphasis="lognorm", tail=net(1), masks=net(1), mask_head=head.clone()
        )  # fmt: skip
    return Case(generator.complete(tokenizer.spec, INFO), scales, pyramid=tokenizer)


def _rar(order):
    net = Placed(layers=2, width=16, heads=2, hidden=24)
    return Case(Causal(net, StartLabel(16), Categorical(bias=True, std=0.02), Aimed()).complete(SPEC, INFO), order)


def _nar(coords, conditioning, head=ByAxis(), **net):
    generator = Neighbouring(Branched(2, 16, 2, hidden=24, **net), conditioning, head)
    return Case(generator.complete(TokenSpec(coords, codes=(12,)), INFO), Diagonals(2))


def _open_magvit2():
    net = {"width": 16, "heads": 2, "hidden": 24}
    head = Factorised(Transformer(1, **net), summed=True)
    generator = Causal(Transformer(2, **net, final=False), Label(16), head, Previous(shared=True))
    return Case(generator.complete(TokenSpec(grid(3, 4), codes=(12, 16)), INFO))


def _far(codes):
    spec, net = TokenSpec(grid(3, 4), codes=codes), {"width": 16, "heads": 2, "hidden": 24}
    head = Factorised(Transformer(1, **net), order=(2, 0, 1))
    return Case(Causal(Transformer(2, final=False, **net), Label(16), head, Joined()).complete(spec, INFO))


def _elm():
    net, inputs = Transformer(2, 16, 2, hidden=24), Joined(shared=False, bias=False)
    generator = Causal(net, Label(16), Bitwise(bias=False, std=0.0), inputs)
    return Case(generator.complete(TokenSpec(grid(3, 4), codes=(12, 12)), INFO))


def _instella():
    net, head = Reader(2, 16, 2, hidden=24, remat="dots"), Bitwise(single=True)
    spec = TokenSpec(grid(1, 12), codes=(2, 2, 2, 2))
    return Case(Causal(net, LayeredCaption(16, parts=2), head, Bits()).complete(spec, INFO))


def _fractal():
    """Grey patches of 2x2 pixels, and a generator of the pixels inside."""
    inner = Causal(Entered(1, 8, 2, hidden=16), FromAbove(8), Colours(Enclosed(1, 8, 2)), PreviousPatch())
    generator = Causal(Entered(2, 16, 2, hidden=24), Repeated(Label(16, apart=True)), Inside(inner), PreviousPatch())
    return Case(generator.complete(TokenSpec(grid(3, 4), codes=(256,) * 4), INFO))


def _line():
    spec, net = TokenSpec(grid(1, 12), codes=(12,)), Transformer(2, 16, 2, hidden=24, line=True)
    return Case(Causal(net, Label(16)).complete(spec, INFO))


def _detailflow():
    spec, net = TokenSpec(grid(4, 3), codes=(12,)), Transformer(2, 16, 2, hidden=24)
    return Case(Causal(net, Label(16), inputs=Grouped(group=3)).complete(spec, INFO), Groups(3, 3))


def _token_shuffle():
    spec, net = TokenSpec(grid(4, 4), codes=(12,)), Transformer(2, 16, 2, hidden=24, final=False)
    generator = NextCell(net, Caption(16), Categorical(z_loss=1e-4), Merged(blocks=1))
    return Case(generator.complete(spec, INFO), Cells(2))


def _hita():
    spec, net = TokenSpec(pyramid(((1, 3), (3, 3))), codes=(12,)), Holistic(2, 16, 2, hidden=24)
    return Case(Causal(net, Label(16), ByLevel(), TwoTables(), emphasis="levels").complete(spec, INFO))


def _vf_prompt(prompt, head=PromptCodes()):
    spec, net = TokenSpec(pyramid((2, (2, 4))), codes=(12,)), Transformer(2, 16, 2, hidden=24)
    return Case(Prompted(net, Label(16), head, prompt=prompt).complete(spec, INFO))


def _jpeg_lm():
    # words of 1 to 9, each ended by 10; after the third comes 11, then padding
    kind = np.array([0, *[1] * 9, 2, 3])
    after = np.array([[-1, 0, 1, -1], [-1, 1, 2, -1], [-1, 2, 3, -1], [-1, -1, -1, 4], [4, -1, -1, -1]])
    spec, net = TokenSpec(grid(1, 12), (12,), grammar=Grammar(kind, after)), Transformer(2, 16, 2, hidden=24, line=True)
    return Case(Causal(net, Start(16)).complete(spec, INFO))


def _ctf():
    tokenizer = Clustered(VQGAN((6, 8), latent=8, **NET), 4)
    own, told = Transformer(2, 16, 2, hidden=24), Transformer(1, 16, 2, hidden=24)
    generator = CoarseToFine(own, Label(16), fine=told, clusters=4).complete(tokenizer.spec, INFO)
    return Clusters(generator, CoarseFirst(), pyramid=tokenizer, cluster=(2, 0, 1, 1, 2, 2, 0, 3, 3, 1, 0, 2))


NET = {"features": 4, "mult": (1, 2), "res_blocks": 1, "codes": 12, "code_features": 4, "groups": 2}
RESIDUAL = ResidualPyramid(size=(6, 6), scales=(1, 2, 3), **NET)
BITS = BitPyramid((6, 6), (1, 2, 3), features=4, mult=(1, 2), res_blocks=1, bits=4, groups=2)
SHARED = TokenFlow(
    size=(6, 6), scales=(1, 2, 3), latent=8, semantic_features=2, backbone=PatchViT(1, 8, 2, patch=2), target=0, **NET
)
INDEPENDENT = Pyramid(size=(6, 6), scales=(1, 2, (1, 3), 3), latent=8, **NET)

CASES = {
    "llamagen_label": _causal(Label(16)),
    "llamagen_caption": _causal(Caption(16)),
    "llamagen_chunk": _causal(Caption(16), head=Categorical(chunk=5), remat="dots"),
    "causal_backwards": _causal(Label(16), backwards),
    "causal_order_per_image": _causal(Caption(16), shuffled),
    "rar": _rar(shuffled),
    "nar": _nar(grid(3, 4), Caption(16)),
    "flashar": _nar(grid(3, 3), Label(16), Fused(collapse=0.1), ahead=1),
    "nar_frames": _nar(pyramid(((2, 3), (2, 3))), Label(16), ahead=1),
    "open_magvit2": _open_magvit2(),
    "fqgan_far": _far((12, 12, 12)),
    "elm": _elm(),
    "instella": _instella(),
    "fractal_ar": _fractal(),
    "ibq": Case(Causal(Modulated(2, 16, 2, hidden=24, gate_size=0.5), Label(16)).complete(SPEC, INFO)),
    "flextok": _line(),
    "jpeg_lm": _jpeg_lm(),
    "gigatok": Case(Causal(Positioned(2, 16, 2, hidden=24), Label(16)).complete(SPEC, INFO)),
    "detailflow": _detailflow(),
    "token_shuffle": _token_shuffle(),
    "hita": _hita(),
    "vf_prompt": _vf_prompt("codes", PromptCodes(prompt_top_k=3)),
    "vf_prompt_random": _vf_prompt("random"),
    "digit": Case(Causal(PostNorm(2, 16, 2, hidden=24), Label(16), Categorical(smoothing=0.1)).complete(SPEC, INFO)),
    "var": _scales(RESIDUAL),
    "var_shared": _scales(RESIDUAL, shared=True, l2_norm=False, remat="dots"),
    "infinity_bits": _scales(BITS, head=Bitwise()),
    "by_dimension": _scales(
        BITS, head=Factorised(Dimensions(1, 8, 2), order=(2, 0, 3, 1), projected=True, guided="rows", std=1.0)
    ),
    "tokenflow": _scales(SHARED, NextScale(channels=6)),
    "flexvar": _scales(INDEPENDENT, Upsampled(channels=4, side=4)),
    "hmar": _scales(RESIDUAL, sees="step"),
}
DRAWN = CASES | {"ctf": _ctf()}  # whose second half is no row of a teacher-forced pass: see test_coarse_to_fine.py
