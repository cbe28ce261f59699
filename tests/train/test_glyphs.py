"""Losses that are careful with writing: where strokes are, what counts there, and what does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.train.glyphs import GlyphEdges, GlyphPixels, Reader, Strokes, slopes
from ar_jax.train.losses import Losses

RANDOM = np.random.default_rng(0)
PAGE = np.full((1, 16, 16, 3), 0.8, np.float32)
PAGE[:, 7:9, 6:11] = -0.8  # a stroke, two pixels high
FAINT = PAGE * 0.05


def test_slopes_are_those_of_a_ramp_and_none_at_a_flat_border():
    row, column = np.mgrid[:5, :6].astype(np.float32)
    found = np.asarray(slopes((0.3 * column - 0.2 * row)[None, ..., None]))[0, 1:-1, 1:-1, 0]
    np.testing.assert_allclose(found, np.broadcast_to([0.3, -0.2], found.shape), atol=1e-6)
    assert not np.any(slopes(np.ones((1, 4, 4, 2), np.float32)))


def test_strokes_are_found_with_a_margin_and_not_where_nothing_is_written():
    found = np.asarray(Strokes(reach=2)(PAGE))[0] > 0
    written = np.zeros((16, 16), bool)
    written[7:9, 6:11] = True
    near = written.copy()
    for _ in range(3):  # an edge is seen from a pixel beside it
        near |= sum(np.roll(near, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)) > 0
    assert found[written].all()
    assert not found[~near].any()
    assert (np.asarray(Strokes(reach=0)(PAGE))[0] > 0).sum() < found.sum()
    assert not np.any(Strokes()(FAINT))


def test_pixels_of_glyphs_count_five_times():
    """With `Pixels` of weight 1: the mean of (1 + 4 m) |difference|."""
    made = PAGE + RANDOM.normal(0, 0.1, PAGE.shape).astype(np.float32)
    parts = Losses(lpips=0.0, adversarial=0.0, reconstruction="l1", others=(("glyphs", GlyphPixels()),)).parts()
    found = sum(part.weight * part({}, {}, PAGE, made) for part in parts.values())
    weight = 1 + 4 * np.asarray(Strokes()(PAGE))[..., None]
    np.testing.assert_allclose(found, (weight * np.abs(made - PAGE)).mean(), rtol=1e-5)
    assert "glyphs" not in Losses(others=(("glyphs", GlyphPixels(0.0)),)).parts()


def test_edges_do_not_see_brightness_and_nothing_counts_where_nothing_is_written():
    edges = GlyphEdges()
    np.testing.assert_allclose(edges({}, {}, PAGE, PAGE + 0.1), 0, atol=1e-6)
    ramp = 0.1 * np.arange(16, dtype=np.float32)[:, None]
    mask = np.asarray(Strokes()(PAGE))
    np.testing.assert_allclose(edges({}, {}, PAGE, PAGE + ramp), 0.1 * mask.mean() / 2, rtol=1e-3)
    for part in (edges, GlyphPixels()):
        assert part({}, {}, FAINT, FAINT + ramp) == 0


class Squares:
    """A reader that sees means of 4x4 pixels, times its parameter."""

    def open(self):
        return {"scale": jnp.float32(2)}

    def __call__(self, params, image):
        return params["scale"] * image.reshape(len(image), 4, 4, 4, 4, 3).mean((2, 4))


def test_a_reader_looks_at_glyphs_only_and_its_gradient_stays_there():
    reader = Reader(network=Squares())
    frozen, made = reader.open(), PAGE + RANDOM.normal(0, 0.3, PAGE.shape).astype(np.float32)
    value, grad = jax.value_and_grad(lambda made: reader({}, frozen, PAGE, made))(jnp.asarray(made))
    mask = np.asarray(Strokes()(PAGE))
    told = 2 * (mask[..., None] * (made - PAGE)).reshape(1, 4, 4, 4, 4, 3).mean((2, 4))
    np.testing.assert_allclose(value, np.square(told).mean(), rtol=1e-4)
    np.testing.assert_array_equal(np.any(np.asarray(grad) != 0, axis=-1), mask > 0)
    assert reader({}, frozen, PAGE, jnp.asarray(PAGE)) == 0


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"strokes\.reach is -1; it must be a number of pixels"):
        Strokes(reach=-1)
    with pytest.raises(ValueError, match=r"strokes\.contrast is nan; it must be a finite number of 0 or more"):
        Strokes(contrast=float("nan"))
