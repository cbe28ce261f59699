"""TiTok's tokenizers: released keys, there and back, refusals."""

import numpy as np
import pytest
from released import assert_same, change, names, released, weights_of
from safetensors.numpy import load_file, save_file

from ar_jax.config import load_config
from ar_jax.convert.__main__ import main, to_folder
from ar_jax.convert.sources import identify

VARIANTS = {
    "tokenizer_titok_l32": "l_32", "tokenizer_titok_b64": "b_64", "tokenizer_titok_s128": "s_128",
    "tokenizer_titok_bl64_vq8k": "bl_64", "tokenizer_titok_bl128_vq8k": "bl_128", "tokenizer_titok_sl256_vq8k": "sl_256",
    "titok_ll32_vae_c16": "ll_32_vae", "titok_bl64_vae_c16": "bl_64_vae", "titok_bl128_vae_c16": "bl_128_vae",
    **{
        f"tatitok_{name.replace('_', '', 1)}": f"ta_{name}"
        for name in ("bl_32_vq", "bl_64_vq", "bl_128_vq", "bl_32_vae", "bl_64_vae", "sl_128_vae")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", names("titok"))
def test_released_checkpoints_have_exactly_these_keys_and_are_the_networks_of_the_configs(name):
    content, shapes = released(name)
    found, sizes = identify(shapes), content["hyperparameters"]
    assert (found.family, found.kind) == ("titok", "tokenizer")
    assert (dict(found.keys), found.trained) == (shapes, content["num_params"])
    ours = load_config(f"titok:{VARIANTS[name]}").tokenizer.module
    plain = {"dtype": found.module.dtype, "remat": "none"}
    assert found.module == ours.clone(
        encoder=ours.encoder.clone(**plain), decoder=ours.decoder.clone(**plain), dtype=found.module.dtype
    )
    assert getattr(found.module, "l2_norm", False) == sizes.get("use_l2_norm", False)
    assert (found.module.encoder.heads, found.module.decoder.heads) == (sizes["enc_heads"], sizes["dec_heads"])
    words, _, _ = found.source.describe(found.module)
    assert f"256x256 pixels to {sizes['num_latent_tokens']} " in words


@pytest.mark.parametrize("folder", ["titok_vq", "titok_vae", "tatitok_vq"])
def test_there_and_back_changes_no_bit(tmp_path, folder, capsys):
    want = weights_of(folder)
    save_file(want, tmp_path / "a.safetensors")
    main([str(tmp_path / "a.safetensors"), "--to", str(tmp_path / "model"), "--heads", "2", "--groups", "2"])
    assert "tokenizer of titok" in capsys.readouterr().out
    main([str(tmp_path / "model"), "--back", str(tmp_path / "back.safetensors")])
    assert_same(load_file(tmp_path / "back.safetensors"), want)


@pytest.mark.parametrize(
    ("folder", "key", "value", "message"),
    [
        ("titok_vq", "pixel_decoder.conv_in.weight", None, r"of titok, but pixel_decoder\.conv_in\.weight is missing"),
        ("titok_vq", "decoder.mask_token", np.ones((1, 1, 31), "f4"), r"mask_token has shape \(1, 1, 31\), expected \(1, 1, 32\)"),
        ("titok_vae", "decoder.positional_embedding", np.ones((9, 32), "f4"), r"decoder\.positional_embedding has 9 rows, which is not one"),
        ("titok_vae", "encoder.ln_pre.weight", None, r"of titok, but encoder\.ln_pre\.weight is missing"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_its_first_difference(tmp_path, folder, key, value, message):
    save_file(change(weights_of(folder), key, value), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        to_folder(tmp_path / "a.safetensors", tmp_path / "model", heads=2, groups=2)
