"""Binary Latent Diffusion's released files: keys, there and back, refusals."""

import numpy as np
import pytest
from released import FAMILIES, assert_same, change, released, weights_of
from safetensors.numpy import load_file, save_file

from ar_jax.config import load_config
from ar_jax.convert.__main__ import main, to_folder
from ar_jax.convert.sources import export, identify
from ar_jax.data import Info
from ar_jax.files.models import open_model


@pytest.mark.parametrize("name", FAMILIES["binary_latent"][0])
def test_released_autoencoders_have_exactly_these_keys_and_are_those_of_the_configs(name):
    content, shapes = released(name)
    found = identify(shapes)
    assert (found.family, found.kind) == ("binary_latent", "tokenizer")
    assert {**found.keys, **found.buffers} == shapes
    unused = sum(int(np.prod(shape)) for shape in found.buffers.values())
    assert found.trained + unused == content["num_params"]
    if name.startswith("ELM"):
        ours = load_config(f"elm:bae_{name.rpartition('-')[2]}").tokenizer.module
    else:
        ours = load_config("binary_latent:" + name.removeprefix("bld_")).tokenizer.module
    assert found.module == ours.clone(dtype=found.module.dtype, attention=(4,), decoder_blocks=2)


def test_the_released_denoiser_is_told_nothing_and_is_that_of_the_config():
    content, shapes = released("bld_churches_c64")
    found = identify(shapes)
    assert {**found.keys, **found.buffers} == shapes
    assert found.trained == content["num_params"]
    stage = load_config("binary_latent:churches_c64")
    ours = stage.generator.module.complete(stage.tokenizer.module.spec, Info())
    net = found.module.backbone.clone(dtype=ours.backbone.dtype, remat=ours.backbone.remat, hidden=0)
    assert (net, found.module.conditioning, found.module.times) == (ours.backbone, ours.conditioning, ours.times)
    assert export(ours, "generator").keys == found.keys


def parts():
    weights = weights_of("binary_latent")
    return {key: value for key, value in weights.items() if key.startswith("ae.")}


def test_there_and_back_changes_no_bit(tmp_path, capsys):
    save_file(parts(), tmp_path / "a.safetensors")
    main([str(tmp_path / "a.safetensors"), "--to", str(tmp_path / "model"), "--size", "16", "--groups", "2"])
    assert "tokenizer of binary_latent, 16x16 pixels to 4x4 tokens of 6 bits" in capsys.readouterr().out
    main([str(tmp_path / "model"), "--back", str(tmp_path / "back.safetensors")])
    assert_same(load_file(tmp_path / "back.safetensors"), parts())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("ae.quantize.proj.0.bias", None, r"of binary_latent, but ae\.quantize\.proj\.0\.bias is missing"),
        ("ae.generator.blocks.0.bias", np.ones(7, "f4"), r"has shape \(7,\), expected \(8,\)"),
        ("ae.encoder.extra", np.ones(3, "f4"), r"ae\.encoder\.extra of shape \(3,\) is not part of this model"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_first_difference(tmp_path, key, value, message):
    save_file(change(parts(), key, value), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        to_folder(tmp_path / "a.safetensors", tmp_path / "model", size=16, groups=2)


def test_bits_are_read_as_sub_codes_where_that_is_asked_for(tmp_path, capsys):
    save_file(parts(), tmp_path / "a.safetensors")
    to_folder(tmp_path / "a.safetensors", tmp_path / "model", size=16, groups=2, sub_codes=2)
    assert "read as 2 sub-codes" in capsys.readouterr().out
    assert open_model(tmp_path / "model", "tokenizer").module.spec.codes == (8, 8)
    with pytest.raises(
        ValueError, match=r"--sub-codes is 4, but .* has no tokens of so many equal parts: tokenizer, .* 6 bits"
    ):
        to_folder(tmp_path / "a.safetensors", tmp_path / "other", size=16, groups=2, sub_codes=4)
    assert not (tmp_path / "other").exists()
