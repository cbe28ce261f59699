"""Hi-MAR's transformers: released keys, there and back, refusals; its tokenizer."""

import math

import numpy as np
import pytest
from released import assert_same, change, names, refused, released, there_and_back, weights_of
from safetensors.numpy import load_file, save_file

from ar_jax.config import load_config
from ar_jax.convert.__main__ import main, to_folder
from ar_jax.convert.sources import identify
from ar_jax.files import codec
from ar_jax.tokenizers.image_pyramid import ImagePyramid


@pytest.mark.parametrize("name", names("himar"))
def test_released_checkpoints_have_exactly_these_keys_and_are_the_networks_of_the_configs(name):
    content, shapes = released(name)
    found = identify(shapes)
    assert (found.family, found.kind) == ("himar", "generator")
    assert {**found.keys, **found.buffers} == shapes
    tables = sum(math.prod(shape) for shape in found.buffers.values())  # of places, which the manifest counts too
    assert found.trained + tables == content["num_params"]
    experiment = load_config(f"himar:{name[-1].lower()}_256")
    words, info, settings = found.source.describe(found.module)
    ours, module = found.module, experiment.generator.module.complete(experiment.tokenizer.module.spec, info)
    for part in ("encoder", "decoder"):
        want, got = getattr(module, part), getattr(ours, part)
        assert got.clone(hidden=0) == want.clone(dtype=got.dtype, remat="none")
    assert (ours.joint_head.width, ours.joint_head.depth, ours.joint_head.heads) == (
        module.joint_head.width,
        module.joint_head.depth,
        module.joint_head.heads,
    )
    assert ours.buffer == module.buffer
    assert "8x8 pivots and 16x16 tokens of 16 numbers, 1000 classes" in words
    assert settings == {"order": codec.encode(experiment.generator.order), "sampling": codec.encode(experiment.generator.sampling)}


def test_there_and_back_changes_no_bit(tmp_path):
    there_and_back(tmp_path, weights_of("himar"), "--heads", "3")


def test_the_tokenizer_is_mars_for_images_of_two_sizes(tmp_path):
    weights = weights_of("kl16_vae")
    save_file(weights, tmp_path / "a.safetensors")
    options = {"size": 64, "groups": 4, "family": "himar"}
    to_folder(tmp_path / "a.safetensors", tmp_path / "model", scales=(2, 4), **options)
    main([str(tmp_path / "model"), "--back", str(tmp_path / "back.safetensors")])
    assert_same(load_file(tmp_path / "back.safetensors"), weights)
    shapes = {key: value.shape for key, value in weights.items()}
    assert identify(shapes, groups=4, size=64).family == "mar"
    assert isinstance(identify(shapes, groups=4, size=64, family="himar", scales=(2, 4)).module, ImagePyramid)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("cond_z_proj.bias", None, r"generator of himar, but cond_z_proj\.bias is missing"),
        ("cond_tokens", np.ones((1, 15, 3), "f4"), r"places for 257 tokens, which make no square"),
        ("encoder_task_emb.weight", np.ones((3, 24), "f4"), r"has shape \(3, 24\), expected \(2, 24\)"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_first_difference(tmp_path, key, value, message):
    refused(tmp_path, change(weights_of("himar"), key, value), message, heads=3)
