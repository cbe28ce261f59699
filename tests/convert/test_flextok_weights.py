"""FlexTok's tokenizers: released keys, there and back, with and without the autoencoder below, refusals."""

import jax
import numpy as np
import pytest
from released import assert_same, change, names, released, there_and_back, weights_of
from safetensors.numpy import load_file, save_file

from ar_jax.config import load_config
from ar_jax.convert.__main__ import main, to_folder
from ar_jax.convert.sources import export, identify
from ar_jax.nets.fixed_norm import FixedNorm
from ar_jax.tokenizers.flextok import FlexTok
from ar_jax.tokenizers.kl_vae import KLVAE


@pytest.mark.parametrize("name", names("flextok"))
def test_released_checkpoints_have_exactly_these_keys_and_are_the_networks_of_the_configs(name):
    content, shapes = released(name)
    found = identify(shapes)
    assert (found.family, found.kind) == ("flextok", "tokenizer")
    assert (dict(found.keys), dict(found.buffers), found.trained) == (shapes, {}, content["num_params"])
    module = load_config("flextok:" + name.removeprefix("flextok_").removesuffix("_in1k")).tokenizer.module
    assert found.module.base == module.base.clone(dtype=found.module.base.dtype)
    for ours, theirs in ((module.encoder, found.module.encoder), (module.decoder, found.module.decoder)):
        assert theirs == ours.clone(dtype=theirs.dtype, remat="none", hidden=theirs.hidden)
        assert theirs.hidden == 8 * ours.width // 3
    assert "256x256 pixels to 256 ordered tokens" in found.source.describe(found.module)[0]


def test_there_and_back_changes_no_bit(tmp_path):
    there_and_back(tmp_path, weights_of("flextok"), "--heads", "3")


def test_with_the_autoencoder_below_there_and_back_changes_no_bit(tmp_path):
    below = KLVAE((16, 24), 4, (1, 2), 1, 2, patch=2, groups=2, encoder_attention=(), channels=1)
    module = FlexTok(below, 5, FixedNorm(1, 128, 2, hidden=8), FixedNorm(1, 64, 1, hidden=8, kinds=2))
    found, random = export(module, "tokenizer"), np.random.default_rng(0)
    want = {key: random.normal(size=shape).astype("f4") for key, shape in found.keys.items()}
    assert sum(key.startswith("vae.vae.") for key in want) == len(jax.tree.leaves(found.params["base"]))
    save_file(want, tmp_path / "a.safetensors")
    main([str(tmp_path / "a.safetensors"), "--to", str(tmp_path / "model"), "--groups", "2"])
    main([str(tmp_path / "model"), "--back", str(tmp_path / "back.safetensors")])
    assert_same(load_file(tmp_path / "back.safetensors"), want)
    assert identify({key: x.shape for key, x in want.items()}, groups=2).module.base == below


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "encoder.module_dict.enc_to_latents.proj.bias",
            None,
            r"tokenizer of flextok, but .*to_latents\.proj\.bias is missing",
        ),
        (
            "encoder.module_dict.enc_to_latents.proj.weight",
            np.ones((7, 48), "f4"),
            r"codes are of 7 numbers, whose levels are not known; known are those of \[6, 5, 4, 3\]",
        ),
        (
            "decoder.module_dict.dec_latent_dropout.nullcond",
            np.full(64, np.nan, "f4"),
            r"nullcond \(our nothing\) holds NaN",
        ),
        ("vae.vae.conv.weight", np.ones(3, "f4"), r"vae\.vae\.encoder\.conv_in\.weight is missing"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_first_difference(tmp_path, key, value, message):
    save_file(change(weights_of("flextok"), key, value), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        to_folder(tmp_path / "a.safetensors", tmp_path / "model", heads=3)
