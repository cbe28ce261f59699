"""Open-MAGVIT2: released keys, there and back, averages kept by Lightning, refusals."""

import numpy as np
import pytest
from released import assert_same, change, names, released, weights_of
from safetensors.numpy import load_file, save_file

from ar_jax.convert.__main__ import main, to_folder
from ar_jax.convert.sources import identify
from ar_jax.files import models


@pytest.mark.parametrize("name", names("open_magvit2"))
def test_released_checkpoints_have_exactly_these_keys(name):
    content, shapes = released(name)
    found = identify(shapes)
    assert found.family == "open_magvit2"
    assert (dict(found.keys), dict(found.buffers)) == (shapes, {})
    assert found.trained == content["num_params"]
    side = 32 if name == "openmagvit2_128_L" else 16
    assert f"256x256 pixels to {side}x{side} codes out of 64 x 4096" in found.source.describe(found.module)[0]


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
        ("openmagvit2_vq", "encoder.conv_in.bias", np.ones(4, "f4"), r"conv_in\.bias of shape \(4,\) is not part"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_first_difference(tmp_path, folder, key, value, message):
    save_file(change(weights_of(folder), key, value), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        to_folder(tmp_path / "a.safetensors", tmp_path / "model", size=16, groups=2)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
