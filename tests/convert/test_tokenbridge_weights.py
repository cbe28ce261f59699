"""TokenBridge's generators: released keys, there and back, refusals; tokenizers whose numbers are rounded on conversion."""

import numpy as np
import pytest
from released import assert_same, change, names, released, weights_of
from safetensors.numpy import load_file, save_file

from ar_jax.config import load_config
from ar_jax.convert.__main__ import main, to_folder
from ar_jax.convert.sources import identify
from ar_jax.files import codec, models
from ar_jax.tokenizers.dimensionwise import Dimensionwise


@pytest.mark.parametrize("name", names("tokenbridge"))
def test_released_checkpoints_have_exactly_these_keys_and_are_the_networks_of_the_configs(name):
    content, shapes = released(name)
    found = identify(shapes)
    assert (found.family, found.kind) == ("tokenbridge", "generator")
    assert {**found.keys, **found.buffers} == shapes
    assert set(found.buffers) == set(content["buffers"])
    assert found.trained == content["num_params"]
    experiment, (words, info, settings) = (
        load_config(f"tokenbridge:{name[12]}_256"),
        found.source.describe(found.module),
    )
    ours = experiment.generator.module.complete(experiment.tokenizer.module.spec, info)
    plain = {"dtype": found.module.head.dtype, "remat": "none"}
    readout = ours.head.readout.clone(dtype=plain["dtype"])
    assert found.module.head == ours.head.clone(net=ours.head.net.clone(**plain, plain_start=True), readout=readout)
    assert found.module.encoder == ours.encoder.clone(**plain, hidden=4 * ours.encoder.width)
    assert list(found.module.head.order) == content["hyperparameters"]["channel_order"]
    assert settings["sampling"] == codec.encode(experiment.generator.sampling)
    assert settings["order"] == codec.encode(experiment.generator.order)
    assert "16x16 tokens of 16 numbers of 64 levels, 1000 classes" in words


def test_there_and_back_changes_no_bit(tmp_path, capsys):
    want = weights_of("tokenbridge")
    save_file(want, tmp_path / "a.safetensors")
    main([str(tmp_path / "a.safetensors"), "--to", str(tmp_path / "model"), "--heads", "2"])
    assert "generator of tokenbridge" in capsys.readouterr().out
    main([str(tmp_path / "model"), "--back", str(tmp_path / "back.safetensors")])
    assert_same(load_file(tmp_path / "back.safetensors"), want)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("condition_proj.bias", None, r"of tokenbridge, but condition_proj\.bias is missing"),
        (
            "token_embeddings.3.weight",
            np.ones((8, 16), "f4"),
            r"token_embeddings\.3\.weight of shape \(8, 16\) is not part",
        ),
        ("output_pos_embed", np.ones((1, 8, 20), "f4"), r"places for 8 tokens, which make no square"),
        ("boundaries", np.ones(8, "f4"), r"boundaries has shape \(8,\), expected \(9,\)"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_first_difference(tmp_path, key, value, message):
    save_file(change(weights_of("tokenbridge"), key, value), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        to_folder(tmp_path / "a.safetensors", tmp_path / "model", heads=2)


def test_a_continuous_tokenizer_is_rounded_on_conversion_and_comes_back_as_it_was(tmp_path, capsys):
    want = weights_of("kl16_vae")
    save_file(want, tmp_path / "a.safetensors")
    options = ["--size", "64", "--groups", "2", "--levels", "8"]
    main([str(tmp_path / "a.safetensors"), "--to", str(tmp_path / "model"), *options])
    assert "each rounded to 8 values" in capsys.readouterr().out
    module = models.open_model(tmp_path / "model", "tokenizer").module
    assert isinstance(module, Dimensionwise)
    assert set(module.spec.codes) == {8}
    main([str(tmp_path / "model"), "--back", str(tmp_path / "back.safetensors")])
    assert_same(load_file(tmp_path / "back.safetensors"), want)
    save_file(weights_of("tokenbridge"), tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"--levels is 8, but .* is no continuous tokenizer: generator"):
        to_folder(tmp_path / "b.safetensors", tmp_path / "other", heads=2, levels=8)
    assert not (tmp_path / "other").exists()
