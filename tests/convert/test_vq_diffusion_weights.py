"""VQ-Diffusion's denoisers: released keys, there and back, refusals."""

import numpy as np
import pytest
from released import assert_same, change, names, refused, released, weights_of
from safetensors.numpy import load_file, save_file

from ar_jax.config import load_config
from ar_jax.convert.__main__ import main
from ar_jax.convert.sources import identify
from ar_jax.files import codec


@pytest.mark.parametrize("name", names("vq_diffusion"))
def test_released_checkpoints_have_exactly_these_keys_and_are_the_networks_of_the_configs(name):
    content, shapes = released(name)
    found = identify(shapes)
    assert (found.family, found.kind) == ("vq_diffusion", "generator")
    assert set(found.buffers) == set(content["buffers"]) | {key for key in shapes if key.endswith("attn2.mask")}
    assert {**found.keys, **found.buffers} == shapes
    assert found.trained == content["num_params"]
    size = name.removeprefix("vq_diffusion_").removesuffix("_learnable")
    stage = load_config(f"vq_diffusion:{size}").generator
    words, info, settings = found.source.describe(found.module)
    ours, plain = stage.module.complete(found.module.spec, info), found.module
    net = ours.backbone.clone(dtype=plain.backbone.dtype, remat="none", hidden=plain.backbone.hidden)
    learned = name.endswith("learnable") or size == "ithq"
    if learned:
        assert plain == ours.clone(backbone=net)
        assert settings == {"order": codec.encode(stage.order), "sampling": codec.encode(stage.sampling)}
    else:
        assert plain.backbone == net
        assert settings["sampling"]["guidance"]["weight"] == 1
    assert f"{content['hyperparameters']['num_codes']} codes, " in words


@pytest.mark.parametrize("folder", ["vq_diffusion", "vq_diffusion_class"])
def test_there_and_back_changes_no_bit(tmp_path, folder, capsys):
    want = weights_of(folder)
    save_file(want | {"content_codec.enc.weight": np.ones(3, "f4")}, tmp_path / "a.safetensors")
    main([str(tmp_path / "a.safetensors"), "--to", str(tmp_path / "model"), "--heads", "4", "--size", "48"])
    said = capsys.readouterr().out
    assert "generator of vq_diffusion" in said
    assert "passed over content_codec.enc.weight" in said
    main([str(tmp_path / "model"), "--back", str(tmp_path / "back.safetensors")])
    assert_same(load_file(tmp_path / "back.safetensors"), want)


@pytest.mark.parametrize(
    ("folder", "key", "value", "message"),
    [
        (
            "vq_diffusion",
            "transformer.to_logits.0.bias",
            None,
            r"of vq_diffusion, but transformer\.to_logits\.0\.bias is mis",
        ),
        (
            "vq_diffusion",
            "transformer.blocks.0.attn2.mask",
            np.ones((1, 1, 9, 9), "f4"),
            r"for 3x4 tokens, but there are 9",
        ),
        (
            "vq_diffusion_class",
            "transformer.extra",
            np.ones(3, "f4"),
            r"transformer\.extra of shape \(3,\) is not part of",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_its_first_difference(tmp_path, folder, key, value, message):
    refused(tmp_path, change(weights_of(folder), key, value), message, heads=4, size=48)
