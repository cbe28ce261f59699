"""Editing: what is kept of an image, and that nothing else is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from trees import random_params

from ar_jax.data import Info
from ar_jax.decode.edit import Edit, free_slots, hold
from ar_jax.decode.glimpse import cells
from ar_jax.decode.sequential import Sequential, Task
from ar_jax.generators.base import Knobs
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import NextScale, Upsampled
from ar_jax.generators.masked import Masked
from ar_jax.heads.flow import Flow
from ar_jax.nets.adaln import AdaLN
from ar_jax.nets.conditioning import Label
from ar_jax.nets.resize import touched
from ar_jax.nets.transformer import Transformer
from ar_jax.nets.vit import ViT
from ar_jax.orders import Shuffled, known_first, raster, scales
from ar_jax.sample import Options, read_edit
from ar_jax.tokenizers.patches import Patches
from ar_jax.tokenizers.pyramid import Pyramid
from ar_jax.tokenizers.residual_pyramid import ResidualPyramid
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.tokens import TokenSpec, grid, pyramid

NET = {"features": 4, "mult": (1, 2), "res_blocks": 0, "codes": 16, "code_features": 3, "groups": 2}
ADALN = AdaLN(2, 16, 2)
METHODS = {
    "var": (
        ResidualPyramid((16, 16), (1, 2, 4, 8), smoothers=2, **NET), Causal(ADALN, Label(16), inputs=NextScale(3)), scales,
    ),
    "flexvar": (
        Pyramid((16, 16), scales=(1, 2, 4, 8), latent=6, **NET), Causal(ADALN, Label(16), inputs=Upsampled(3)), scales,
    ),
    "llamagen": (VQGAN((16, 16), latent=6, **NET), Causal(Transformer(2, 16, 2, hidden=24), Label(16)), raster),
    "mar": (
        Patches((16, 16), 4), Masked(ViT(1, 16, 2), ViT(1, 16, 2), Label(16), Flow(width=16, depth=1, steps=3), buffer=2), Shuffled(4, 2),
    ),
}  # fmt: skip
IMAGES = 2
IMAGE = np.random.default_rng(0).uniform(-1, 1, (IMAGES, 16, 16, 3)).astype(np.float32)
HOLE = np.zeros((IMAGES, 16, 16), bool)
HOLE[:, 5:11, 5:11] = True
each_fixed = pytest.mark.parametrize("method", ["var", "flexvar", "llamagen"])


@functools.cache
def ready(method):
    """Tokenizer, its parameters, generator, its parameters, all random."""
    tokenizer, generator, _ = METHODS[method]
    generator = generator.complete(tokenizer.spec, Info(classes=3))
    return tokenizer, random_params(tokenizer, 0.5), generator, random_params(generator, 0.3)


@functools.cache
def program(method, edited, keep_scales=0):
    """Draws tokens and images; of masks only a generator of any order must know while it is compiled."""
    tokenizer, frozen_params, generator, params = ready(method)
    order_fn, keys = METHODS[method][2], jax.random.split(jax.random.key(5), IMAGES)
    order, ranks = order_fn(tokenizer.spec, keys, IMAGES, 0), 0
    if edited and generator.any_order:
        known = ~np.asarray(free_slots(tokenizer.spec, HOLE))[0]
        order, ranks = known_first(order_fn, tokenizer.spec, known, keys), int(known.sum())
    knobs = Knobs(np.ones(len(order.sizes), np.float32), np.ones(len(order.sizes), np.float32))
    batch = {"label": np.arange(IMAGES, dtype=np.int32)}

    @jax.jit
    def run(params, frozen_params, free):
        frozen, source = functools.partial(tokenizer.apply, {"params": frozen_params}), None
        if edited:
            source, frozen = hold(tokenizer, frozen, Edit(jnp.asarray(IMAGE), free, keep_scales, ranks))
        tokens, _ = Sequential()(Task(generator, params, batch, order, knobs, keys, False, frozen, source))
        return tokens, frozen(tokens, method="decode")

    return lambda free: jax.tree.map(np.asarray, run(params, frozen_params, free))


def edited(method, free, keep_scales=0):
    """Tokens and images of an edit."""
    return program(method, True, keep_scales)(np.broadcast_to(free, HOLE.shape))


def plain(method):
    return program(method, False)(HOLE)


@functools.cache
def tokenized(method):
    tokenizer, frozen, *_ = ready(method)

    @jax.jit
    def run(frozen):
        tokens = tokenizer.apply({"params": frozen}, IMAGE, method="encode")
        return tokens, tokenizer.apply({"params": frozen}, tokens, method="decode")

    return jax.tree.map(np.asarray, run(frozen))


def test_a_cell_is_free_if_any_of_its_pixels_is():
    free = np.zeros((1, 4, 6), bool)
    free[0, 1, 3] = True
    np.testing.assert_array_equal(touched(free, (2, 3))[0], [[0, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(touched(free, (3, 4))[0], [[0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]])  # cells overlap
    spec = TokenSpec(pyramid((1, (2, 3))), codes=(4,))
    np.testing.assert_array_equal(free_slots(spec, free)[0], [1, 0, 1, 0, 0, 0, 0])


def test_tokens_without_a_cell_are_free_if_any_pixel_is_and_show_nothing_before_all_are_there():
    spec, free = TokenSpec(grid(1, 3), codes=(4,), placed=False), np.zeros((2, 8, 8), bool)
    free[1, 7, 0] = True
    np.testing.assert_array_equal(free_slots(spec, free), [[0, 0, 0], [1, 1, 1]])
    np.testing.assert_array_equal(
        cells(spec, np.array([[1, 1, 0], [1, 1, 1]], bool), (2, 2)), [[[0, 0]] * 2, [[1, 1]] * 2]
    )


@each_fixed
def test_without_free_pixels_the_image_is_the_tokenizers_reconstruction(method):
    np.testing.assert_allclose(edited(method, False)[1], tokenized(method)[1], atol=1e-5)


@each_fixed
def test_with_all_pixels_free_the_image_is_a_plain_sample(method):
    tokens, images = edited(method, True)
    np.testing.assert_array_equal(tokens, plain(method)[0])
    np.testing.assert_allclose(images, plain(method)[1], atol=1e-5)
    assert (tokens != tokenized(method)[0]).mean() > 0.5


@pytest.mark.parametrize("method", METHODS)
def test_tokens_without_free_pixels_are_the_images_own(method):
    tokenizer, (tokens, _), own = METHODS[method][0], edited(method, HOLE), tokenized(method)[0]
    free = np.asarray(free_slots(tokenizer.spec, HOLE))
    np.testing.assert_array_equal(tokens[~free], own[~free])
    assert (tokens[free] != own[free]).mean() > 0.5
    assert 0 < free.mean() < 1


def test_where_scales_add_up_the_latent_of_kept_pixels_is_the_images_own():
    tokenizer, params, *_ = ready("var")
    (tokens, _), own, cells = edited("var", HOLE), tokenized("var")[0], np.asarray(touched(HOLE, (8, 8)))
    sums = functools.partial(tokenizer.apply, {"params": params}, method="sums")
    for got, want in zip(sums(tokens, (own, cells)), sums(own)):
        np.testing.assert_array_equal(got[~cells], want[~cells])
        assert np.abs(got - want)[cells].max() > 0.01
    assert np.abs(sums(tokens)[-1] - sums(own)[-1])[~cells].max() > 0.01  # the tokens alone would not do


def test_first_scales_can_be_kept():
    tokens, own = edited("flexvar", True, 2)[0], tokenized("flexvar")[0]
    np.testing.assert_array_equal(tokens[:, :5], own[:, :5])
    assert (tokens[:, 5:] != own[:, 5:]).mean() > 0.5
    assert (tokens[:, 5:] != plain("flexvar")[0][:, 5:]).any()


def test_known_slots_come_first_and_the_others_in_an_order_of_their_own():
    spec = TokenSpec(grid(3, 3), channels=2)
    known = np.array([0, 1, 0, 0, 1, 0, 0, 0, 0], bool)
    order = known_first(Shuffled(3), spec, known, jax.random.split(jax.random.key(0), 4))
    slot = np.asarray(order.slot)
    assert (order.sizes[0], sum(order.sizes), len(order.sizes)) == (2, 9, 4)
    assert (slot[:, :2] == [1, 4]).all()
    assert (np.sort(slot, axis=1) == np.arange(9)).all()
    assert len(np.unique(slot, axis=0)) > 1


def test_a_photo_is_edited_as_viewers_show_it_with_a_mask_drawn_over_it(tmp_path):
    seen, exif = np.zeros((16, 32, 3), np.uint8), Image.Exif()
    seen[:, 24:] = 200
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(np.rot90(seen))).save(tmp_path / "photo.png", exif=exif)  # lies on its side
    Image.fromarray(seen).save(tmp_path / "mask.png")
    options = Options(run="", edit=str(tmp_path / "photo.png"), mask=str(tmp_path / "mask.png"))
    given = read_edit(options, Patches((16, 32), 4))
    np.testing.assert_array_equal(given.image, seen)
    np.testing.assert_array_equal(given.free, seen[..., 0] > 0)
