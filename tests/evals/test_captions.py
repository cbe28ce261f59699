"""The scripts that judge images by captions and cut windows of photographs."""

import captions
import numpy as np
import pytest
import windows


def test_the_rank_of_a_caption_counts_those_that_are_nearer():
    words, swapped = np.eye(6), np.eye(6)[[1, 0, 2, 3, 4, 5]]
    np.testing.assert_array_equal(captions.ranks(5 * words - 4 * words.mean(0), words), 1)  # the mean says nothing
    np.testing.assert_array_equal(captions.ranks(0.6 * words + 0.4 * swapped, words), 1)
    np.testing.assert_array_equal(captions.ranks(0.4 * words + 0.6 * swapped, words), [2, 2, 1, 1, 1, 1])


def test_the_nearest_image_is_found_by_psnr():
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), np.uint8)
    off = images[[3, 1]].copy()
    off[..., 0] ^= 16
    found = captions.nearest(off, images)
    np.testing.assert_allclose(found, 20 * np.log10(255) - 10 * np.log10(16**2 / 3), rtol=1e-3)


def test_a_picture_has_a_cell_for_every_caption():
    images = np.full((3, 8, 8, 3), 200, np.uint8)
    sheet = captions.picture(["a", "b", "some long words of a caption"], [images, images], side=16, across=2)
    found = np.asarray(sheet.convert("RGB"))
    assert found.shape == (2 * (16 + 32), 2 * (2 * 18 + 12), 3)
    assert (found == 200).all(-1).sum() >= 3 * 2 * 16 * 16


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (60, 60)])
def test_windows_of_the_two_splits_lie_in_the_photograph_and_share_no_pixel(size):
    seen = np.zeros((2, *size), int)
    for held_out in (False, True):
        boxes = windows.windows(size, 300, held_out, np.random.default_rng(0))
        sides = boxes[:, 2:] - boxes[:, :2]
        assert (sides[:, 0] == sides[:, 1]).all()
        assert sides.min() >= 0.25 * min(size)
        assert sides.max() <= 0.4 * min(size)
        assert (boxes >= 0).all()
        assert (boxes[:, 2:] <= size).all()
        for left, top, right, bottom in boxes:
            seen[int(held_out), left:right, top:bottom] += 1
    assert not (seen[0].astype(bool) & seen[1].astype(bool)).any()
    assert seen.any(0).mean() > 0.97
