import itertools
import os

import jax
import ml_dtypes
import numpy as np
import pytest
from released import assert_same, change, names, refused, released, torch_file, weights_of
from safetensors.numpy import load_file, save_file

from ar_jax.convert.__main__ import main, to_file, to_folder
from ar_jax.convert.sources import identify, param_shapes
from ar_jax.data import Info
from ar_jax.files import models
from ar_jax.generators.causal import Causal
from ar_jax.nets.conditioning import Label
from ar_jax.nets.transformer import Transformer
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.tokens import TokenSpec, grid
from ar_jax.train.checkpoint import save_params

TINY = {
    "llamagen_vq": {"size": 32, "groups": 2},
    "llamagen_gpt_c2i": {"size": 48, "heads": 3},
    "llamagen_gpt_t2i": {"size": 48, "heads": 3},
}


@pytest.mark.parametrize("name", names("llamagen"))
def test_released_checkpoints_have_exactly_these_keys_and_sizes(name):
    content, shapes = released(name)
    sizes = content["hyperparameters"]
    found = identify(shapes, size=sizes.get("image_size", 0))
    buffers = {key: shapes[key] for key in content["buffers"] if key not in found.source.FIXED}
    assert dict(found.buffers) == buffers
    assert {**found.keys, **buffers} == shapes
    assert found.trained == content["num_params"]
    words, info, settings = found.source.describe(found.module)
    if found.kind == "tokenizer":
        assert found.module.codes == sizes["codebook_size"]
    else:
        assert found.module.spec.n == sizes["block_size"]
        assert found.module.backbone.heads == sizes["n_head"]
        assert info.classes == sizes.get("num_classes", 0)
        assert settings["sampling"]["guidance"]["weight"] > 1
        assert f"{sizes['n_layer']} layers" in words


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("folder", TINY)
def test_there_and_back_changes_no_bit(tmp_path, folder, suffix, capsys):
    weights = weights_of(folder)
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch_file(file, weights)
    else:
        save_file(weights, file)
    options = [str(word) for name, value in TINY[folder].items() for word in (f"--{name}", value)]
    main([str(file), "--to", str(tmp_path / "model"), *options])
    assert "of llamagen" in capsys.readouterr().out
    main([str(tmp_path / "model"), "--back", str(tmp_path / "back.safetensors")])
    assert_same(load_file(tmp_path / "back.safetensors"), weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([file.name, "model", "back.safetensors"])
    kind = "tokenizer" if folder == "llamagen_vq" else "generator"
    assert models.open_model(tmp_path / "model", kind).settings["origin"]["file"] == file.name


def test_half_precision_is_widened(tmp_path):
    half = {key: value.astype(ml_dtypes.bfloat16) for key, value in weights_of("llamagen_gpt_c2i").items()}
    to_folder(torch_file(tmp_path / "a.pt", half), tmp_path / "model", size=48, heads=3)
    to_file(tmp_path / "model", tmp_path / "back.safetensors")
    assert_same(load_file(tmp_path / "back.safetensors"), {key: value.astype("f4") for key, value in half.items()})


@pytest.mark.parametrize(
    ("folder", "key", "value", "message"),
    [
        ("llamagen_gpt_c2i", "norm.weight", None, r"norm\.weight is missing"),
        ("llamagen_gpt_c2i", "tok_embeddings.weight", None, r"tok_embeddings\.weight is missing"),
        ("llamagen_gpt_c2i", "norm.weight", np.ones(47, "f4"), r"norm\.weight has shape \(47,\), expected \(48,\)"),
        ("llamagen_gpt_c2i", "norm.bias", np.ones(48, "f4"), r"norm\.bias of shape \(48,\) is not part"),
        ("llamagen_gpt_c2i", "norm.weight", np.ones(48, "i4"), r"norm\.weight holds int32"),
        ("llamagen_vq", "encoder.conv_in.weight", None, r"encoder\.conv_in\.weight is missing"),
        ("llamagen_vq", "decoder.mid.1.q.bias", None, r"decoder\.mid\.1\.q\.bias is missing"),
        ("llamagen_vq", "quantize.codebook_used", np.ones(3, "f4"), r"quantize\.codebook_used has shape"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_first_difference(tmp_path, folder, key, value, message):
    refused(tmp_path, change(weights_of(folder), key, value), message, **TINY[folder])


def test_an_unknown_file_is_refused(tmp_path):
    save_file({"blocks.0.weight": np.ones((2, 3), "f4")}, tmp_path / "a.safetensors")
    with pytest.raises(SystemExit, match=r"not a checkpoint of a known family.*blocks\.0\.weight \[2, 3\]"):
        main([str(tmp_path / "a.safetensors"), "--to", str(tmp_path / "model")])
    assert not (tmp_path / "model").exists()


def test_the_image_size_comes_from_the_file_name_or_is_asked_for(tmp_path):
    weights = weights_of("llamagen_gpt_c2i")
    save_file(weights, tmp_path / "c2i_T.safetensors")
    with pytest.raises(ValueError, match="--size 256"):
        to_folder(tmp_path / "c2i_T.safetensors", tmp_path / "model", heads=3)
    with pytest.raises(ValueError, match="width 48 is not published; give --heads"):
        to_folder(tmp_path / "c2i_T.safetensors", tmp_path / "model", size=48)
    os.rename(tmp_path / "c2i_T.safetensors", tmp_path / "c2i_T_384.safetensors")
    to_folder(tmp_path / "c2i_T_384.safetensors", tmp_path / "model", heads=3)
    assert models.open_model(tmp_path / "model", "generator").module.spec.n == 24 * 24


def test_nothing_is_overwritten(tmp_path):
    save_file(weights_of("llamagen_gpt_c2i"), tmp_path / "a.safetensors")
    (tmp_path / "model").mkdir()
    to_folder(tmp_path / "a.safetensors", tmp_path / "model", **TINY["llamagen_gpt_c2i"])  # an empty one is fine
    with pytest.raises(ValueError, match="already there"):
        to_folder(tmp_path / "a.safetensors", tmp_path / "model", **TINY["llamagen_gpt_c2i"])
    with pytest.raises(ValueError, match="already there"):
        to_file(tmp_path / "model", tmp_path / "a.safetensors")


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ar_jax.convert.__main__.save_params", full)
    save_file(weights_of("llamagen_gpt_c2i"), tmp_path / "a.safetensors")
    with pytest.raises(SystemExit, match="No space left"):
        main([str(tmp_path / "a.safetensors"), "--to", str(tmp_path / "model"), "--size", "48", "--heads", "3"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def run_folder(path, conditioning):
    """A generator as a run keeps it, without an origin."""
    info = Info(classes=5)
    module = Causal(Transformer(layers=2, width=16, heads=2, hidden=24), conditioning)
    module = module.complete(TokenSpec(grid(2, 2), codes=(7,)), info)
    numbers = itertools.count()
    shapes = param_shapes(module)
    params = jax.tree.map(lambda x: np.full(x.shape, next(numbers), x.dtype), shapes)
    models.describe(path, "generator", module, info, {})
    save_params(path / "params", params)
    return params


def test_a_network_trained_here_has_a_way_back(tmp_path):
    params = run_folder(tmp_path / "run" / "generator", Label(16))
    to_file(tmp_path / "run", tmp_path / "out.safetensors")
    weights = load_file(tmp_path / "out.safetensors")
    np.testing.assert_array_equal(weights["output.weight"], params["head"]["readout"]["kernel"].T)
    found = identify({key: value.shape for key, value in weights.items()}, size=32, heads=2)
    assert found.kind == "generator"


def test_a_folder_of_two_models_is_ambiguous(tmp_path):
    run_folder(tmp_path / "generator", Label(16))
    models.describe(tmp_path / "tokenizer", "tokenizer", VQGAN(), Info(), {})
    with pytest.raises(ValueError, match="holds two models"):
        to_file(tmp_path, tmp_path / "out.safetensors")
