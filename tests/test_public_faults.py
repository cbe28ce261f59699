"""Faults that users of the field met in public, each held to what is right."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ar_jax.files.images import save_png
from ar_jax.machine.seeds import seed_key
from ar_jax.sample import GRIDS, Options, read_edit
from ar_jax.sampler import image_keys
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.train.claim import claimed

TOKENIZER = VQGAN((8, 8), features=4, mult=(1, 2), res_blocks=0, latent=4, codes=16, code_features=4, groups=2)


def bits(key):
    return jax.random.key_data(key).tolist()


def test_seeds_of_64_bits_differ_and_small_ones_are_what_they_were():
    for seed in (0, 7, 2**31, 2**32 - 1, np.int64(5)):
        assert bits(seed_key(seed)) == bits(jax.random.key(int(seed)))
    large = [bits(seed_key(seed)) for seed in (0, 2**32, 2**32 + 1, 2**63, 2**64 - 1)]
    assert len(set(map(tuple, large))) == 5
    ids = jnp.arange(2)
    first, second = (np.asarray(jax.random.key_data(image_keys(seed, ids)[0])) for seed in (0, 2**32))
    assert (first != second).any()
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=f"seed is {seed}; it must be 0 to 2\\^64 - 1"):
            seed_key(seed)


def test_a_photo_to_edit_lies_as_viewers_show_it(tmp_path):
    pixels, exif = np.zeros((16, 8, 3), np.uint8), Image.Exif()
    pixels[:8] = 255
    exif[0x0112] = 6  # turned by a quarter to the right: what was above lies right
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", exif=exif, quality=100)
    Image.fromarray(pixels).save(tmp_path / "mask.jpg", exif=exif, quality=100)
    given = read_edit(Options(run="", edit=str(tmp_path / "photo.jpg"), mask=str(tmp_path / "mask.jpg")), TOKENIZER)
    assert (given.image[:, 5:] > 200).all()
    assert (given.image[:, :3] < 50).all()
    assert given.free[:, 5:].all()
    assert not given.free[:, :3].any()


HOLD = """
import sys, time
from pathlib import Path
from ar_jax.train.claim import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_run_folder_is_trained_once_at_a_time(tmp_path):
    run = tmp_path / "runs" / "mine"
    with claimed(run):
        assert run.is_dir()
    assert not (tmp_path / "runs").exists(), "what stayed empty leaves nothing behind"
    other = subprocess.Popen([sys.executable, "-c", HOLD, run], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(ValueError, match=rf"is being trained by process {other.pid} on .*, since 20\d\d-"),
            claimed(run),
        ):
            pass
    finally:
        other.kill()
        other.wait()
    with claimed(run):  # a killed process holds nothing
        (run / "kept").touch()
    assert [file.name for file in run.iterdir()] == ["kept"]


@pytest.mark.parametrize("name", ["grid.PNG", "grid.jpg", "GRID.JPEG", "grid.webp"])
def test_grids_are_what_their_name_says(tmp_path, name):
    image = np.full((8, 8, 3), 200, np.uint8)
    save_png(tmp_path / name, image, {"seed": "1"})
    with Image.open(tmp_path / name) as file:
        assert file.format == {"PNG": "PNG", "WEBP": "WEBP"}.get(name.rpartition(".")[2].upper(), "JPEG")
        assert np.abs(np.asarray(file).astype(int) - image).max() <= 2
    assert (tmp_path / name).suffix.lower() in GRIDS
