"""Open-MAGVIT2: released keys, there and back, averages kept by Lightning, refusals."""

import jax.numpy as jnp
import numpy as np
import pytest
from released import assert_same, change, names, refused, released, weights_of
from safetensors.numpy import load_file, save_file

from ar_jax.config import load_config
from ar_jax.convert.__main__ import main, to_folder
from ar_jax.convert.sources import identify
from ar_jax.files import codec, models


@pytest.mark.parametrize("name", names("open_magvit2"))
def test_released_checkpoints_have_exactly_these_keys(name):
    content, shapes = released(name)
    found = identify(shapes)
    assert found.family == "open_magvit2"
    assert (dict(found.keys), dict(found.buffers)) == (shapes, {})
    assert found.trained == content["num_params"]
    words, info, settings = found.source.describe(found.module)
    if found.kind == "tokenizer":
        side = 32 if name == "openmagvit2_128_L" else 16
        assert f"256x256 pixels to {side}x{side} codes out of 64 x 4096" in words
        return
    experiment, ours = load_config(f"open_magvit2:{name.removeprefix('openmagvit2_AR_').lower()}"), found.module
    stage = experiment.generator
    module = stage.module.complete(experiment.tokenizer.module.spec, info)
    assert ours.backbone == module.backbone.clone(dtype=jnp.float32, remat="none", hidden=ours.backbone.hidden)
    small = module.head.net.clone(dtype=jnp.float32, hidden=ours.head.net.hidden)
    assert ours.head == module.head.clone(net=small, readout=ours.head.readout)
    assert settings == {"order": codec.encode(stage.order), "sampling": codec.encode(stage.sampling)}
    assert "16x16 tokens with 64 x 4096 codes, 1000 classes" in words


def test_a_generator_comes_back_with_the_word_of_released_names_and_its_file_may_hold_a_tokenizer(tmp_path, capsys):
    plain = weights_of("openmagvit2_ar")
    want = {"transformer." + key: value for key, value in plain.items()}
    beside = {"first_stage_model." + key: value for key, value in weights_of("openmagvit2_vq").items()}
    for name, file in (("released", want | beside), ("plain", plain)):
        save_file(file, tmp_path / f"{name}.safetensors")
        main([str(tmp_path / f"{name}.safetensors"), "--to", str(tmp_path / name), "--size", "48", "--heads", "2"])
        out = capsys.readouterr().out
        assert "3x3 tokens with 8 x 16 codes, 5 classes" in out
        assert ("passed over first_stage_model." in out) == (name == "released")
        main([str(tmp_path / name), "--back", str(tmp_path / f"{name}_back.safetensors")])
        assert_same(load_file(tmp_path / f"{name}_back.safetensors"), want)


def test_there_and_back_changes_no_bit(tmp_path, capsys):
    want = weights_of("openmagvit2_vq")
    save_file(want, tmp_path / "a.safetensors")
    main([str(tmp_path / "a.safetensors"), "--to", str(tmp_path / "model"), "--size", "16", "--groups", "2"])
    assert "tokenizer of open_magvit2, 16x16 pixels to 4x4 codes out of 64;" in capsys.readouterr().out
    main([str(tmp_path / "model"), "--back", str(tmp_path / "back.safetensors")])
    assert_same(load_file(tmp_path / "back.safetensors"), want)
    assert models.open_model(tmp_path / "model", "tokenizer").settings["origin"]["family"] == "open_magvit2"


def test_losses_are_passed_over_and_the_average_is_taken_whose_names_have_no_dots(tmp_path, capsys):
    plain = weights_of("openmagvit2_vq")
    average = {f"model_ema.{key.replace('.', '')}": value + 1 for key, value in plain.items()}
    file = (
        plain
        | average
        | {"loss.discriminator.main.0.weight": np.ones((4, 3, 4, 4), "f4"), "model_ema.decay": np.ones((), "f4")}
    )
    save_file(file, tmp_path / "a.safetensors")
    to_folder(tmp_path / "a.safetensors", tmp_path / "model", size=16, groups=2)
    assert "takes model_ema, the moving average, which its authors evaluate" in capsys.readouterr().out
    main([str(tmp_path / "model"), "--back", str(tmp_path / "back.safetensors")])
    assert_same(load_file(tmp_path / "back.safetensors"), {key: value + 1 for key, value in plain.items()})


@pytest.mark.parametrize(
    ("folder", "key", "value", "message"),
    [
        (
            "openmagvit2_vq",
            "encoder.conv_out.weight",
            None,
            r"of open_magvit2, but encoder\.conv_out\.weight is missing",
        ),
        ("openmagvit2_vq", "decoder.adaptive.0.beta.bias", None, r"decoder\.adaptive\.0\.beta\.bias is missing"),
        (
            "openmagvit2_ar",
            "head.1.weight",
            None,
            r"generator of open_magvit2, but transformer\.head\.1\.weight is missing",
        ),
        ("openmagvit2_vq", "encoder.conv_in.bias", np.ones(4, "f4"), r"conv_in\.bias of shape \(4,\) is not part"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_first_difference(tmp_path, folder, key, value, message):
    refused(tmp_path, change(weights_of(folder), key, value), message, size=16, groups=2, heads=2)
