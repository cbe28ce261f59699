import io
import os

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, PngImagePlugin

from ar_jax.data import Unreadable, centre_crop, flip, random_crop, read_image, ten_crop


def test_centre_crop_keeps_the_middle_of_the_long_side():
    image = np.zeros((4, 7, 3), np.uint8)
    image[:, :, 0] = np.arange(7)
    # The short side is 4 already, so no pixel changes; (7 - 4) // 2 = 1 column goes on the left.
    np.testing.assert_array_equal(centre_crop(image, 4)[0, :, 0], [1, 2, 3, 4])


def test_centre_crop_halves_with_a_box_before_bicubic():
    image = np.random.default_rng(0).integers(0, 256, (18, 16, 3), np.uint8)
    boxes = Image.fromarray(image).resize((8, 9), Image.Resampling.BOX)  # 16 >= 2*8 once, then 8 < 16
    np.testing.assert_array_equal(centre_crop(image, 8), np.asarray(boxes)[:8])
    bicubic = boxes.resize((5, round(9 * 5 / 8)), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(centre_crop(image, 5), np.asarray(bicubic)[:5])


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 8), (64, 9), (17, 200)])
def test_crops_have_the_asked_size(shape):
    image = np.zeros((*shape, 3), np.uint8)
    assert centre_crop(image, 8).shape == (8, 8, 3)
    assert random_crop(image, 8, np.random.default_rng(0), 0.8).shape == (8, 8, 3)


@pytest.mark.parametrize("crop", [centre_crop, lambda *given: random_crop(*given, np.random.default_rng(0), 0.8)])
def test_memory_of_a_crop_does_not_grow_with_the_length_of_a_thin_image(crop, monkeypatch):
    made, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *how: made.append(size) or resize(self, size, *how))
    for shape in ((1, 2000), (2000, 1), (3, 300), (1, 9)):
        assert crop(np.zeros((*shape, 3), np.uint8), 32).shape == (32, 32, 3)
        assert max(height * width for height, width in made) <= 40 * 40


def test_a_crop_of_a_thin_image_shows_what_lies_there():
    image = np.zeros((16, 400, 3), np.uint8)
    image[:, :, 0], image[:, :, 1] = np.arange(400) // 2, np.arange(16)[:, None] * 10
    np.testing.assert_array_equal(centre_crop(image, 16), image[:, 192:208])
    np.testing.assert_array_equal(centre_crop(image.swapaxes(0, 1), 16), image[:, 192:208].swapaxes(0, 1))
    rng = np.random.default_rng(0)
    places = [int(random_crop(image, 16, rng, 1.0)[0, 0, 0]) for _ in range(300)]
    assert min(places) < 10
    assert max(places) > 180  # of 0 to 192


def test_random_crop_draws_every_scale_and_place():
    image = np.zeros((10, 10, 3), np.uint8)
    image[:, :, 0], image[:, :, 1] = np.arange(10)[:, None], np.arange(10)
    rng = np.random.default_rng(0)
    crops = [random_crop(image, 8, rng, 0.8) for _ in range(200)]
    # At the largest scale, ceil(8 / 0.8) = 10, the image is not resized and the corner is one of 3x3.
    corners = {tuple(crop[0, 0, :2].tolist()) for crop in crops if crop[7, 7, 0] - crop[0, 0, 0] == 7}
    assert {(y, x) for y in range(3) for x in range(3)} <= corners
    assert len({crop.tobytes() for crop in crops}) >= 9 + 4 + 1


def test_random_crop_of_fraction_one_at_own_size_is_the_image():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    np.testing.assert_array_equal(random_crop(image, 8, np.random.default_rng(0), 1.0), image)


def test_ten_crop_is_corners_centre_and_their_mirrors():
    image = np.zeros((4, 5, 3), np.uint8)
    image[:, :, 0] = np.arange(20).reshape(4, 5)
    crops = ten_crop(image, 2)
    assert crops.shape == (10, 2, 2, 3)
    assert crops.dtype == np.uint8
    assert crops[:5, :, :, 0].tolist() == [
        [[0, 1], [5, 6]],
        [[3, 4], [8, 9]],
        [[10, 11], [15, 16]],
        [[13, 14], [18, 19]],
        [[6, 7], [11, 12]],
    ]
    np.testing.assert_array_equal(crops[5:], flip(crops[:5]))
    assert crops[5, 0, :, 0].tolist() == [1, 0]
    with pytest.raises(ValueError, match="larger image than 5x4"):
        ten_crop(image, 6)


def _written(image: Image.Image, form: str = "PNG", **options) -> np.ndarray:
    file = io.BytesIO()
    image.save(file, form, **options)
    read = read_image(io.BytesIO(file.getvalue()))
    assert read.mode == "RGB"
    return np.asarray(read)


def test_sixteen_bit_greys_are_scaled_not_clipped():
    grey = np.array([[0, 257, 32896, 65535]], np.uint16)
    for form in ("PNG", "TIFF"):
        assert _written(Image.fromarray(grey), form)[0, :, 0].tolist() == [0, 1, 128, 255]
    pgm = b"P5 4 1 65535\n" + grey.astype(">u2").tobytes()
    assert np.asarray(read_image(io.BytesIO(pgm)))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_transparency_shows_white():
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    rgba.putpixel((1, 0), (255, 0, 0, 255))
    assert _written(rgba).tolist() == [[[255, 255, 255], [255, 0, 0]]]
    assert _written(Image.new("LA", (1, 1), (0, 0))).tolist() == [[[255, 255, 255]]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    for form in ("PNG", "GIF"):
        assert _written(palette, form, transparency=0).tolist() == [[[255, 255, 255], [40, 50, 60]]]
    assert _written(palette).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    keyed = _written(Image.new("RGB", (1, 1), (1, 2, 3)), transparency=(1, 2, 3))
    assert keyed.tolist() == [[[255, 255, 255]]]


def test_other_modes_become_rgb():
    assert _written(Image.new("1", (1, 1), 1)).tolist() == [[[255, 255, 255]]]
    assert _written(Image.new("L", (1, 1), 7)).tolist() == [[[7, 7, 7]]]
    cmyk = _written(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    np.testing.assert_allclose(cmyk[0, 0], [255, 0, 0], atol=3)
    webp = _written(Image.new("RGB", (3, 2), (9, 9, 9)), "WEBP", lossless=True)
    assert webp.tolist() == [[[9, 9, 9]] * 3] * 2


def test_the_first_frame_of_an_animation_is_read():
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    assert _written(frames[0], "GIF", save_all=True, append_images=frames[1:])[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_photos_stand_as_viewers_show_them(form):
    seen = np.zeros((16, 32, 3), np.uint8)
    seen[:8, :16, 0], seen[:8, 16:, 1], seen[8:, :16, 2] = 255, 255, 255  # as it is to be seen
    turned = {1: seen, 2: seen[:, ::-1], 3: seen[::-1, ::-1], 4: seen[::-1], 5: seen.swapaxes(0, 1)}
    turned |= {6: np.rot90(seen), 7: np.rot90(seen.swapaxes(0, 1), 2), 8: np.rot90(seen, -1), 9: seen}
    for orientation, stored in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(stored)).save(file, form, exif=exif)
        read = np.asarray(read_image(io.BytesIO(file.getvalue()))).astype(int)
        assert read.shape == seen.shape
        assert np.abs(read - seen)[4:-4, 4:-4].mean() < 16, (orientation, form)  # colours run in JPEG
        as_stored = np.asarray(read_image(io.BytesIO(file.getvalue()), upright=False))
        assert as_stored.shape == (stored.shape if form != "TIFF" else seen.shape)  # Pillow itself turns TIFF


def test_exif_that_cannot_be_read_turns_nothing():
    file = io.BytesIO()
    Image.new("RGB", (4, 2)).save(file, "PNG", exif=b"Exif\0\0no such thing")
    assert read_image(io.BytesIO(file.getvalue())).size == (4, 2)


def test_floats_without_a_range_are_refused(tmp_path):
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "f.tiff")
    Image.fromarray(np.full((2, 2), 70000, np.int32)).save(tmp_path / "i.tiff")
    for name in ("f.tiff", "i.tiff"):
        with pytest.raises(Unreadable, match=f"{name} .*no agreed range"):
            read_image(tmp_path / name)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_damaged_missing_and_enormous_images_are_unreadable(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("cut.jpg", "text.png", "empty.png", "missing.jpg"):
        with pytest.raises(Unreadable, match=name):
            read_image(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)  # Pillow itself only warns here
    with pytest.raises(Unreadable, match="pixels"):
        read_image(tmp_path / "whole.jpg")


def test_what_is_no_image_format_of_ours_is_not_decoded(tmp_path, monkeypatch):
    """PostScript under an image's name would be run by Ghostscript."""
    ran = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given, **named: ran.append(given))
    (tmp_path / "cat.jpg").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(made) (w) file closefile\n%%EOF\n"
    )
    with pytest.raises(Unreadable, match=r"cat\.jpg"):
        read_image(tmp_path / "cat.jpg")
    assert not ran
    for name in ("jpeg", "png", "webp", "bmp", "gif", "tiff", "ppm", "jp2"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"a.{name}")
        assert read_image(tmp_path / f"a.{name}").size == (8, 8)


@pytest.mark.parametrize("size", [3 * 2**20, 70 * 2**20])
@pytest.mark.parametrize("kind", ["tEXt", "zTXt", "iTXt"])
def test_long_texts_in_a_png_are_passed_over(tmp_path, size, kind):
    text, image = PngImagePlugin.PngInfo(), Image.new("RGB", (8, 4), "red")
    if kind == "iTXt":
        text.add_itxt("workflow", "x" * size, zip=True)
    else:
        text.add_text("workflow", "x" * size, zip=kind == "zTXt")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", pnginfo=text, exif=exif)
    read = read_image(tmp_path / "a.png")
    assert (read.size, read.getpixel((0, 0))) == ((4, 8), (255, 0, 0))
    assert read_image(io.BytesIO((tmp_path / "a.png").read_bytes())).size == (4, 8)


def test_a_pipe_and_a_thread_of_pixels_are_unreadable(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(Unreadable, match="it is no plain file"):
        read_image(tmp_path / "pipe.png")
    Image.new("L", (1, 3_000_000)).save(tmp_path / "long.png")
    with pytest.raises(Unreadable, match="1x3000000: one side is more than 128 times the other"):
        read_image(tmp_path / "long.png")
