"""Halton-MaskGIT's generators: released keys, there and back, refusals."""

import numpy as np
import pytest
from released import assert_same, change, names, released, weights_of
from safetensors.numpy import load_file, save_file

from ar_jax.config import load_config
from ar_jax.convert.__main__ import main, to_folder
from ar_jax.convert.sources import identify
from ar_jax.files import codec


@pytest.mark.parametrize("name", names("halton"))
def test_released_checkpoints_have_exactly_these_keys_and_are_the_networks_of_the_configs(name):
    content, shapes = released(name)
    found = identify(shapes)
    assert (found.family, found.kind) == ("halton", "generator")
    assert {**found.keys, **found.buffers} == shapes
    assert found.trained == content["num_params"]
    pixels, size = name.split("_")[-2:]
    stage = load_config(f"halton:{size[0]}_{pixels}").generator
    words, info, settings = found.source.describe(found.module)
    ours, plain = stage.module.complete(found.module.spec, info), found.module
    net = ours.backbone.clone(dtype=plain.backbone.dtype, remat="none", hidden=plain.backbone.hidden)
    assert plain == ours.clone(backbone=net)
    assert settings == {"order": codec.encode(stage.order), "sampling": codec.encode(stage.sampling)}
    assert "tokens of 16384 codes, 1000 classes" in words


def test_there_and_back_changes_no_bit(tmp_path, capsys):
    want = weights_of("halton_maskgit")
    save_file(want, tmp_path / "a.safetensors")
    main([str(tmp_path / "a.safetensors"), "--to", str(tmp_path / "model"), "--heads", "3"])
    assert "generator of halton, 2 layers of width 24 with 3 heads, 5x5 tokens" in capsys.readouterr().out
    main([str(tmp_path / "model"), "--back", str(tmp_path / "back.safetensors")])
    assert_same(load_file(tmp_path / "back.safetensors"), want)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("head.bias", None, r"of halton, but head\.bias is missing"),
        (
            "head.weight",
            np.ones((18, 24), "f4"),
            r"head\.weight and tok_emb\.weight differ, but are the same parameters",
        ),
        ("pos_emb.weight", np.ones((24, 24), "f4"), r"places for 24 tokens, which make no square"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_first_difference(tmp_path, key, value, message):
    save_file(change(weights_of("halton_maskgit"), key, value), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        to_folder(tmp_path / "a.safetensors", tmp_path / "model", heads=3)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_width_that_was_not_published_needs_the_number_of_heads(tmp_path):
    save_file(weights_of("halton_maskgit"), tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError, match=r"its width is 24, and published models have 384, 512, 768, 1024: give --heads"
    ):
        to_folder(tmp_path / "a.safetensors", tmp_path / "model")
