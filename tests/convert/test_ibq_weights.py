"""IBQ: released keys, there and back, refusals."""

import jax.numpy as jnp
import numpy as np
import pytest
from released import assert_same, change, names, refused, released, weights_of
from safetensors.numpy import load_file, save_file

from ar_jax.config import load_config
from ar_jax.convert.__main__ import main, to_folder
from ar_jax.convert.sources import identify
from ar_jax.files import codec


@pytest.mark.parametrize("name", names("ibq"))
def test_released_checkpoints_have_exactly_these_keys_and_are_the_networks_of_the_configs(name):
    content, shapes = released(name)
    found = identify(shapes)
    assert found.family == "ibq"
    assert (dict(found.keys), dict(found.buffers)) == (shapes, {})
    assert found.trained == content["num_params"]
    (words, info, settings), ours = found.source.describe(found.module), found.module
    variant = name.removeprefix("ibq_").removeprefix("AR_").lower()
    if found.kind == "tokenizer":
        assert ours == load_config(f"ibq:vq_{variant}").tokenizer.module.clone(dtype=jnp.float32)
        assert words.startswith(f"256x256 pixels to 16x16 codes out of {variant}, chosen by inner product")
        return
    experiment = load_config(f"ibq:{variant}")
    stage = experiment.generator
    module = stage.module.complete(experiment.tokenizer.module.spec, info)
    assert ours.backbone == module.backbone.clone(dtype=jnp.float32, remat="none", hidden=ours.backbone.hidden)
    assert settings == {"order": codec.encode(stage.order), "sampling": codec.encode(stage.sampling)}
    assert "16x16 tokens with 16384 codes, 1000 classes" in words


@pytest.mark.parametrize(("folder", "word", "side"), [("ibq_vq", "", 16), ("ibq_ar", "transformer.", 48)])
def test_there_and_back_changes_no_bit(tmp_path, folder, word, side):
    want = {word + key: value for key, value in weights_of(folder).items()}
    save_file(want, tmp_path / "a.safetensors")
    to_folder(tmp_path / "a.safetensors", tmp_path / "model", size=side, groups=2, heads=2)
    main([str(tmp_path / "model"), "--back", str(tmp_path / "back.safetensors")])
    assert_same(load_file(tmp_path / "back.safetensors"), want)


@pytest.mark.parametrize(
    ("folder", "key", "value", "message"),
    [
        ("ibq_vq", "quant_conv.bias", None, r"tokenizer of ibq, but quant_conv\.bias is missing"),
        (
            "ibq_vq",
            "quantize.embedding.weight",
            np.ones((23, 6), "f4"),
            r"of ibq, but \S+ has shape \(\d+,.*, expected",
        ),
        ("ibq_ar", "head_nm.ada_lin.1.bias", None, r"of ibq, but transformer\.head_nm\.ada_lin\.1\.bias is missing"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_first_difference(tmp_path, folder, key, value, message):
    refused(tmp_path, change(weights_of(folder), key, value), message, size=48, groups=2, heads=2)
