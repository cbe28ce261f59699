"""TiTok's generators: released keys, there and back, refusals."""

import numpy as np
import pytest
from released import assert_same, change, names, refused, released, weights_of
from safetensors.numpy import load_file, save_file

from ar_jax.config import load_config
from ar_jax.convert.__main__ import main
from ar_jax.convert.sources import identify
from ar_jax.files import codec


@pytest.mark.parametrize("name", names("maskgit"))
def test_released_checkpoints_have_exactly_these_keys_and_are_the_networks_of_the_configs(name):
    content, shapes = released(name)
    found = identify(shapes)
    assert (found.family, found.kind, dict(found.buffers)) == ("maskgit", "generator", {})
    assert dict(found.keys) == shapes
    assert found.trained == content["num_params"]
    stage, (words, info, settings) = (
        load_config(f"maskgit:{name.removeprefix('generator_')}").generator,
        found.source.describe(found.module),
    )
    ours, plain = stage.module.complete(found.module.spec, info), found.module
    same = {"dtype": plain.backbone.dtype, "remat": "none"}
    assert plain.clone(head=ours.head, backbone=ours.backbone) == ours
    assert (plain.backbone, plain.head) == (ours.backbone.clone(**same), ours.head.clone(dtype=same["dtype"]))
    assert settings == {"order": codec.encode(stage.order), "sampling": codec.encode(stage.sampling)}
    h = content["hyperparameters"]
    assert (stage.order.steps, stage.sampling.temperature.value) == (h["num_steps"], h["randomize_temperature"])
    late = h["guidance_decay"] == "power-cosine"
    assert stage.sampling.guidance.weight == h["guidance_scale"] + (not late)
    assert f"{h['image_seq_len']} tokens with 4096 codes, 1000 classes" in words


@pytest.mark.parametrize("folder", ["maskgit_vit", "maskgit_uvit"])
def test_there_and_back_changes_no_bit(tmp_path, folder, capsys):
    want = weights_of(folder)
    # names of the first may lack the word before them all
    save_file({key.removeprefix("model."): value for key, value in want.items()}, tmp_path / "a.safetensors")
    main([str(tmp_path / "a.safetensors"), "--to", str(tmp_path / "model"), "--heads", "4"])
    assert "generator of maskgit" in capsys.readouterr().out
    main([str(tmp_path / "model"), "--back", str(tmp_path / "back.safetensors")])
    assert_same(load_file(tmp_path / "back.safetensors"), want)


@pytest.mark.parametrize(
    ("folder", "key", "value", "message"),
    [
        ("maskgit_vit", "model.lm_head.bias", None, r"of maskgit, but model\.lm_head\.bias is missing"),
        (
            "maskgit_vit",
            "model.embeddings.word_embeddings.weight",
            np.ones((26, 32), "f4"),
            r"has 26 rows .* too few for 24",
        ),
        ("maskgit_uvit", "in_blocks.1.norm1.bias", np.ones(32, "f4"), r"a UViT needs an even number"),
        ("maskgit_uvit", "out_blocks.0.skip_linear.bias", None, r"out_blocks\.0\.skip_linear\.bias is missing"),
        ("maskgit_uvit", "pos_embed", np.ones((1, 9, 31), "f4"), r"shape \(1, 9, 31\), expected \(1, 9, 32\)"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_first_difference(tmp_path, folder, key, value, message):
    refused(tmp_path, change(weights_of(folder), key, value), message, heads=4)
