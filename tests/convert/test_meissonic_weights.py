"""Meissonic's released file: its keys, there and back, refusals."""

import numpy as np
import pytest
from released import assert_same, change, generator_of, names, refused, released, there_and_back, weights_of
from safetensors.numpy import load_file, save_file

from ar_jax.config import load_config
from ar_jax.convert.__main__ import main
from ar_jax.data import Info


@pytest.mark.parametrize("name", names("meissonic"))
def test_the_released_checkpoint_has_exactly_these_keys_and_is_the_network_of_the_config(name):
    found, ours, words, info = generator_of(name, "meissonic:1024")
    assert "14 double and 28 single layers of width 1024 with 8 heads, 64x64 tokens" in words
    assert (info.text_rows, info.text_width) == (78, 1024)
    published = released(name)[0]["hyperparameters"]["axes_dims_rope"]
    assert ours.backbone.axes == found.module.backbone.axes == tuple(published)


@pytest.mark.parametrize("folder", ["meissonic", "meissonic_plain"])
def test_there_and_back_changes_no_bit(tmp_path, folder):
    there_and_back(tmp_path, weights_of(folder), "--size", "64")


def test_a_tensor_under_two_names_comes_back_under_one(tmp_path):
    want = weights_of("meissonic")
    twice = {f"down_block.downsample.{name}.weight": want["down_block.downsample.conv.weight"] for name in ("conv", "Conv2d_0")}
    for kept in (twice, dict(list(twice.items())[1:])):
        rest = {key: value for key, value in want.items() if key not in twice}
        save_file(rest | kept, tmp_path / "a.safetensors")
        folder = tmp_path / f"model{len(kept)}"
        main([str(tmp_path / "a.safetensors"), "--to", str(folder), "--size", "64"])
        main([str(folder), "--back", str(folder / "back.safetensors")])
        assert_same(load_file(folder / "back.safetensors"), want)


@pytest.mark.parametrize(
    ("folder", "key", "value", "size", "message"),
    [
        ("meissonic", "embed.conv.weight", None, 64, r"generator of meissonic, but embed\.conv\.weight is missing"),
        ("meissonic", "context_embedder.bias", np.ones(3, "f4"), 64, r"shape \(3,\), expected \(24,\)"),
        ("meissonic", "embed.embeddings.weight", np.ones((20, 24), "f4"), 64, r"vocabulary is 20; .* more than the 20 codes"),
        ("meissonic", "embed.conv.weight", np.ones((24, 24, 1, 1), "f4"), 48, r"--size is 48; .* multiple of 32 pixels"),
        ("meissonic_plain", "cond_embed.linear_1.weight", np.ones((24, 9), "f4"), 48, r"takes 9 numbers, which are no vector"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_first_difference(tmp_path, folder, key, value, size, message):
    refused(tmp_path, change(weights_of(folder), key, value), message, size=size)


def test_data_without_captions_are_refused():
    experiment = load_config("meissonic:1024")
    for info, message in ((Info(classes=3), "gives no caption features"), (Info(text_width=8, text_rows=1), "text_rows is 1")):
        with pytest.raises(ValueError, match=message):
            experiment.generator.module.complete(experiment.tokenizer.module.spec, info)
