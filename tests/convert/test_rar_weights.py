"""RAR's generators and MaskGIT's tokenizer: released keys, there and back, refusals."""

import numpy as np
import pytest
from released import assert_same, change, names, refused, released, weights_of
from safetensors.numpy import load_file, save_file

from ar_jax.config import load_config
from ar_jax.convert.__main__ import main
from ar_jax.convert.sources import identify
from ar_jax.files import codec, models


@pytest.mark.parametrize("name", names("rar"))
def test_released_checkpoints_have_exactly_these_keys_and_are_the_networks_of_the_configs(name):
    content, shapes = released(name)
    variant = name.removeprefix("rar_") if name.startswith("rar_") else "vq"
    found = identify(shapes)
    assert (found.family, found.kind) == ("rar", "tokenizer" if variant == "vq" else "generator")
    assert (dict(found.keys), dict(found.buffers)) == (shapes, {})
    assert found.trained == content["num_params"]
    experiment, (words, info, settings) = load_config(f"rar:{variant}"), found.source.describe(found.module)
    if variant == "vq":
        assert found.module == experiment.tokenizer.module.clone(dtype=found.module.dtype)
        assert words == "256x256 pixels to 16x16 codes out of 1024"
        return
    stage, ours = experiment.generator, found.module
    module = stage.module.complete(experiment.tokenizer.module.spec, info)
    assert (ours.inputs.rows, ours.conditioning) == (module.inputs.rows, module.conditioning)
    assert ours.backbone == module.backbone.clone(dtype=ours.backbone.dtype, remat="none")
    assert ours.head == module.head.clone(dtype=ours.head.dtype)
    assert settings == {"order": codec.encode(stage.order), "sampling": codec.encode(stage.sampling)}
    assert "16 heads, 16x16 tokens with 1024 codes, 1000 classes" in words


TINY = {"maskgit_vqgan": ("tokenizer", "--size", "64", "--groups", "2"), "rar": ("generator", "--heads", "2")}


@pytest.mark.parametrize("folder", TINY)
def test_there_and_back_changes_no_bit(tmp_path, folder, capsys):
    want, (kind, *options) = weights_of(folder), TINY[folder]
    save_file(want, tmp_path / "a.safetensors")
    main([str(tmp_path / "a.safetensors"), "--to", str(tmp_path / "model"), *options])
    assert f"{kind} of rar" in capsys.readouterr().out
    main([str(tmp_path / "model"), "--back", str(tmp_path / "back.safetensors")])
    assert_same(load_file(tmp_path / "back.safetensors"), want)
    assert models.open_model(tmp_path / "model", kind).settings["origin"]["family"] == "rar"


@pytest.mark.parametrize(
    ("folder", "key", "value", "message"),
    [
        ("rar", "cls_token", None, r"of rar, but cls_token is missing"),
        ("rar", "lm_head.weight", None, r"of rar, but lm_head\.weight is missing"),
        ("rar", "blocks.1.attn.q_norm.bias", np.ones(15, "f4"), r"q_norm\.bias has shape \(15,\), expected \(16,\)"),
        ("rar", "target_aware_pos_embed", np.ones((1, 1034, 32), "f4"), r"shape \(1, 1034, 32\), expected \(1, 1033, 32\)"),
        ("rar", "pos_embed", np.ones((1, 1034, 32), "f4"), r"pos_embed has 1034 rows, which is not 1024 more than"),
        ("rar", "mask_token", np.ones(32, "f4"), r"mask_token of shape \(32,\) is not part of this model"),
        ("maskgit_vqgan", "encoder.conv_in.weight", None, r"tokenizer of rar, but encoder\.conv_in\.weight is missing"),
        ("maskgit_vqgan", "encoder.conv_in.bias", np.ones(4, "f4"), r"conv_in\.bias of shape \(4,\) is not part"),
        ("maskgit_vqgan", "decoder.up.2.upsample_conv.bias", None, r"upsample_conv\.bias is missing"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_its_first_difference(tmp_path, folder, key, value, message):
    refused(tmp_path, change(weights_of(folder), key, value), message, size=64, groups=2, heads=2)
