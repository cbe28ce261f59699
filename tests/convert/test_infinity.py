"""Infinity's tokenizers: released keys, there and back, refusals."""

import re

import numpy as np
import pytest
from released import assert_same, change, names, refused, released, weights_of
from safetensors.numpy import load_file, save_file

from ar_jax.config import load_config
from ar_jax.convert.__main__ import main
from ar_jax.convert.choose import identified
from ar_jax.convert.infinity import fills
from ar_jax.convert.sources import identify
from ar_jax.tokenizers.bit_pyramid import BitPyramid


@pytest.mark.parametrize("name", names("infinity"))
def test_released_tokenizers_have_exactly_these_keys_and_are_those_of_the_configs(name):
    content, shapes = released(name)
    found = identify(shapes)
    assert (found.family, found.kind) == ("infinity", "tokenizer")
    assert {**found.keys, **found.buffers} == shapes
    assert set(found.buffers) == set(content["buffers"])
    assert found.trained == content["num_params"]
    ours = load_config("infinity:" + name.removeprefix("infinity_").removesuffix("_f8_14_patchify")).tokenizer.module
    assert found.module == ours.clone(dtype=found.module.dtype, scale_drop=0.0)
    assert len(found.module.spec.codes) == int(name.split("_")[2].removeprefix("d"))
    with pytest.raises(ValueError, match=r"of 300 pixels none are published .*give --scales"):
        identify(shapes, size=300)


def test_what_each_bit_counts_is_written():
    places = fills(BitPyramid(bits=4))["quantizer.lfq.mask"]
    np.testing.assert_array_equal(places, [8, 4, 2, 1])


OPTIONS = ("--size", "32", "--groups", "2", "--scales", "1", "2", "4", "8")


def test_there_and_back_changes_no_bit(tmp_path, capsys):
    want = weights_of("infinity_bsq_vae")
    save_file(want, tmp_path / "a.safetensors")
    main([str(tmp_path / "a.safetensors"), "--to", str(tmp_path / "model"), *OPTIONS])
    assert (
        "tokenizer of infinity, 32x32 pixels to scales 1x1 2x2 4x4 8x8 of tokens of 6 bits" in capsys.readouterr().out
    )
    main([str(tmp_path / "model"), "--back", str(tmp_path / "back.safetensors")])
    assert_same(load_file(tmp_path / "back.safetensors"), want)


def test_names_without_what_layers_are_wrapped_as_are_read_too(tmp_path):
    want = weights_of("infinity_bsq_vae")
    plain = {re.sub(r"\.(conv|norm)\.(weight|bias)$", r".\2", key): value for key, value in want.items()}
    assert "decoder.up.1.upsample.conv.weight" in plain
    _, named = identified(tmp_path, plain, size=32, groups=2, scales=(1, 2, 4, 8))
    assert_same(named, want)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "encoder.mid.block_2.norm1.norm.bias",
            None,
            r"of infinity, but encoder\.mid\.block_2\.norm1\.norm\.bias is mis",
        ),
        ("decoder.up.1.upsample.conv.conv.bias", np.ones(3, "f4"), r"has shape \(3,\), expected \(8,\)"),
        ("quantizer.lfq.mask", np.ones(5, "i4"), r"mask has shape \(5,\), expected \(6,\)"),
        (
            "encoder.mid.attn_1.q.weight",
            np.ones(3, "f4"),
            r"attn_1\.q\.weight of shape \(3,\) is not part of this model",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_its_first_difference(tmp_path, key, value, message):
    refused(tmp_path, change(weights_of("infinity_bsq_vae"), key, value), message, size=32, groups=2, scales=(1, 2, 4, 8))
