"""KL-16 and MAR: released keys, there and back."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_llamagen import ROOT, assert_same, manifest, tiny  # noqa: F401

from ar_jax.convert.__main__ import main
from ar_jax.convert.sources import identify
from ar_jax.files import codec, models
from ar_jax.orders import OrderFn, Shuffled


@pytest.mark.parametrize("name", ["kl16", "MAR-B", "MAR-L", "MAR-H"])
def test_released_checkpoints_have_exactly_these_keys_and_sizes(name):
    path = ROOT / "manifests" / f"{name}.json"
    if not path.exists():
        pytest.skip(f"no manifest at {path}; set AR_JAX_PARITY")
    content, shapes = manifest(path)
    sizes, found = content["hyperparameters"], identify(shapes)
    assert found.keys == shapes
    assert found.trained == content["num_params"]
    words, info, settings = found.source.describe(found.module)
    if name == "kl16":
        assert (found.kind, found.module.scale, found.module.shift) == ("tokenizer", (0.2325,), (0.0,))
        assert "16x16 tokens of 16 numbers" in words
        return
    module = found.module
    assert (found.kind, info.classes) == ("generator", sizes["class_num"])
    assert module.encoder.layers == sizes["encoder_depth"]
    assert module.decoder.heads == sizes["decoder_num_heads"]
    assert (module.head.depth, module.head.width) == (sizes["diffloss_d"], sizes["diffloss_w"])
    assert module.buffer == sizes["buffer_size"]
    assert codec.decode(settings["order"], OrderFn) == Shuffled(64)
    assert settings["sampling"]["guidance"] > 2.5


@pytest.mark.parametrize(
    ("folder", "kind", "options"),
    [("kl16_vae", "tokenizer", ("--size", "64", "--groups", "4")), ("mar", "generator", ("--heads", "2"))],
)
def test_there_and_back_changes_no_bit(tmp_path, tiny, folder, kind, options, capsys):  # noqa: F811
    weights = tiny(folder)
    if kind == "tokenizer":  # what training left in the file is kept, but of no use
        weights["loss.discriminator.main.0.weight"] = np.ones((2, 3, 4, 4), np.float32)
    save_file(weights, tmp_path / "weights.safetensors")
    main([str(tmp_path / "weights.safetensors"), "--to", str(tmp_path / "model"), *options])
    assert f"{kind} of mar" in capsys.readouterr().out
    main([str(tmp_path / "model"), "--back", str(tmp_path / "back.safetensors")])
    assert_same(load_file(tmp_path / "back.safetensors"), weights)
    assert models.open_model(tmp_path / "model", kind).settings["origin"]["family"] == "mar"
