"""Released VAR, FlexVAR and HMAR transformers, there and back."""

import functools

import numpy as np
import pytest
from released import ROOT, names, released
from safetensors.numpy import load_file, save_file

from ar_jax.convert import next_scale
from ar_jax.convert.__main__ import to_file, to_folder
from ar_jax.convert.sources import export, identify
from ar_jax.files import models

TINY = {"var": (1, 2, 3, 4, 6), "var_shared_adaln": (1, 2, 3, 5), "flexvar": (1, 2, 3, 5), "hmar": (1, 2, 3, 4)}

pytestmark = pytest.mark.skipif(not ROOT.exists(), reason=f"no fixtures at {ROOT}; set AR_JAX_PARITY")


@pytest.mark.parametrize("name", names("next_scale"))
def test_released_checkpoints_have_exactly_these_keys_and_sizes(name):
    content, shapes = released(name)
    sizes, found = content["hyperparameters"], identify(shapes)
    buffers = {key: shapes[key] for key in content["buffers"]}
    assert (found.family, found.kind, dict(found.buffers)) == ("next_scale", "generator", buffers)
    assert {**found.keys, **buffers} == shapes
    assert found.trained == content["num_params"]
    assert [height for height, _ in found.module.spec.scales] == sizes["patch_nums"]
    assert found.module.backbone.heads == sizes["num_heads"]
    _, info, settings = found.source.describe(found.module)
    assert info.classes == 1000
    assert settings["sampling"]["guidance"]["type"] == "ar_jax.decode.guidance:Ramp"
    assert {key: value.shape for key, value in next_scale.fills(found.module).items()}.items() <= buffers.items()


@pytest.mark.parametrize("folder", TINY)
def test_there_and_back_changes_no_bit(tmp_path, folder):
    weights = load_file(ROOT / folder / "weights.safetensors")
    save_file(weights, tmp_path / "a.safetensors")
    to_folder(tmp_path / "a.safetensors", tmp_path / "model", scales=TINY[folder])
    to_file(tmp_path / "model", tmp_path / "b.safetensors")
    found = load_file(tmp_path / "b.safetensors")
    assert found.keys() == weights.keys()
    for key, value in weights.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)
    module = models.open_model(tmp_path / "model", "generator").module
    for key, value in next_scale.fills(module).items() if folder != "flexvar" else ():  # its mask is of a usual list
        np.testing.assert_array_equal(value, weights[key], err_msg=f"what a network trained here gets as {key}")


def test_hmar_is_merged_from_its_two_trainings():
    scales, masks, joint = (load_file(ROOT / "hmar" / f"{name}.safetensors") for name in ("nsp", "mp", "weights"))
    merged = next_scale.merge(scales, masks, last=1)
    assert {key: value.shape for key, value in merged.items()} == {key: value.shape for key, value in joint.items()}
    np.testing.assert_array_equal(merged["base_blocks.1.ffn.fc1.weight"], scales["blocks.1.ffn.fc1.weight"])
    np.testing.assert_array_equal(merged["ns_blocks.0.ffn.fc1.weight"], scales["blocks.2.ffn.fc1.weight"])
    np.testing.assert_array_equal(merged["mask_blocks.0.ffn.fc1.weight"], masks["blocks.2.ffn.fc1.weight"])
    np.testing.assert_array_equal(merged["mask_head.bias"], masks["head.bias"])
    with pytest.raises(ValueError, match="equally many blocks, more than 8; got 3 and 3"):
        next_scale.merge(scales, masks)
    with pytest.raises(ValueError, match="lacks mask_embed"):
        next_scale.merge(scales, scales, last=1)


def test_the_two_files_of_an_hmar_become_one_model(tmp_path, monkeypatch):
    monkeypatch.setattr(next_scale, "merge", functools.partial(next_scale.merge, last=1))
    files = {name: ROOT / "hmar" / f"{name}.safetensors" for name in ("nsp", "mp")}
    to_folder(files["nsp"], tmp_path / "model", scales=TINY["hmar"], masks=files["mp"])
    to_file(tmp_path / "model", tmp_path / "b.safetensors")
    found, want = load_file(tmp_path / "b.safetensors"), next_scale.merge(*map(load_file, files.values()))
    for key, value in want.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)
    with pytest.raises(ValueError, match="masked predictor's weights alone; give them with --masks"):
        to_folder(files["mp"], tmp_path / "half", scales=TINY["hmar"])


def test_scales_that_do_not_fit_are_refused():
    shapes = {key: value.shape for key, value in load_file(ROOT / "var" / "weights.safetensors").items()}
    with pytest.raises(ValueError, match="66 positions, which no published list of scales has; give --scales"):
        identify(shapes)
    with pytest.raises(ValueError, match="66 positions, but scales"):
        identify(shapes, scales=(1, 2, 3))
    with pytest.raises(ValueError, match="masked predictor's weights alone"):
        identify(
            {key: value.shape for key, value in load_file(ROOT / "hmar" / "mp.safetensors").items()},
            scales=(1, 2, 3, 4),
        )


def test_a_network_trained_here_has_a_way_back():
    shapes = {key: value.shape for key, value in load_file(ROOT / "hmar" / "weights.safetensors").items()}
    assert export(identify(shapes, scales=(1, 2, 3, 4)).module, "generator").family == "next_scale"
