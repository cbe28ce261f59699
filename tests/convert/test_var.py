"""The tokenizers of VAR and FlexVAR: released keys, there and back, refusals."""

import jax
import numpy as np
import pytest
from released import assert_same, change, refused, released, torch_file, weights_of
from safetensors.numpy import load_file, save_file

from ar_jax.convert.__main__ import main, to_file, to_folder
from ar_jax.convert.names import to_weights
from ar_jax.convert.sources import export, identify, param_shapes
from ar_jax.files import models
from ar_jax.tokenizers.pyramid import Pyramid
from ar_jax.tokenizers.residual_pyramid import ResidualPyramid

SETTINGS = {"size": 64, "groups": 2, "scales": (1, 2, 3, 4)}  # of the tiny fixture
SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


@pytest.mark.parametrize(
    ("name", "family", "network"),
    [("vae_ch160v4096z32", "var", ResidualPyramid), ("FlexVAE", "flexvar", Pyramid)],
)
def test_released_tokenizers_have_exactly_these_keys_and_sizes(name, family, network):
    content, shapes = released(name)
    found = identify(shapes)
    assert (found.family, found.kind) == (family, "tokenizer")
    assert found.module == network(), "its defaults are the published ones"
    assert dict(found.buffers) == {key: shapes[key] for key in content["buffers"]}
    assert {**found.keys, **found.buffers} == shapes
    assert found.trained == content["num_params"]
    assert found.module.scales == SCALES
    assert found.module.codes == content["hyperparameters"].get("vocab_size", 8912)
    assert "scales 1 2 3 4 5" in found.source.describe(found.module)[0]


def test_larger_images_have_their_published_scales_and_the_counted_hits_stay():
    _, shapes = released("vae_ch160v4096z32")
    found = identify(shapes, size=512)
    assert found.module.scales == (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
    assert found.module.spec.n == 2240
    found = identify(shapes, size=1024)  # of 14 scales; the hits are of 10
    assert found.buffers == {"quantize.ema_vocab_hit_SV": (10, 4096)}
    assert len(identify(released("FlexVAE")[1], size=512).module.scales) == 15
    for name in ("vae_ch160v4096z32", "FlexVAE"):
        with pytest.raises(ValueError, match=r"latent of 20x20 .*give --scales"):
            identify(released(name)[1], size=320)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_there_and_back_changes_no_bit(tmp_path, suffix, capsys):
    weights = weights_of("var_vqvae")
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch_file(file, weights)
    else:
        save_file(weights, file)
    options = ["--size", "64", "--groups", "2", "--scales", "1", "2", "3", "4"]
    main([str(file), "--to", str(tmp_path / "model"), *options])
    assert "tokenizer of var" in capsys.readouterr().out
    main([str(tmp_path / "model"), "--back", str(tmp_path / "back.safetensors")])
    assert_same(load_file(tmp_path / "back.safetensors"), weights)
    assert models.open_model(tmp_path / "model", "tokenizer").settings["origin"]["family"] == "var"


@pytest.mark.parametrize("smoothers", [0, 1, 3])
def test_other_numbers_of_residual_convolutions_have_names_too(smoothers):
    module = ResidualPyramid((16, 16), (1, 2, 4), 4, (1, 1, 2), 1, 8, 4, groups=2, smoothers=smoothers)
    found = export(module, "tokenizer")
    again = identify({**found.keys, **found.buffers}, size=16, groups=2, scales=(1, 2, 4))
    assert again.module == module
    names = {0: ".0.weight .1.weight .2.weight", 1: ".qresi.weight"}.get(
        smoothers, ".qresi_ls.0.weight .qresi_ls.1.weight .qresi_ls.2.weight"
    )
    for name in names.split():
        assert found.keys[f"quantize.quant_resi{name}"] == (4, 4, 3, 3)


def test_a_tokenizer_of_independent_scales_comes_back_as_one(tmp_path):
    module = Pyramid(
        size=(16, 16), scales=(1, 2, 4), features=4, mult=(1, 1, 2), res_blocks=1, latent=8, code_features=32, groups=2
    )
    found, numbers = export(module, "tokenizer"), np.random.default_rng(0)
    shapes = param_shapes(module)
    params = jax.tree.map(lambda x: numbers.normal(size=x.shape).astype(np.float32), shapes)
    weights = {**to_weights(params, found.rules), "quantize.codebook_used": np.zeros(65536, np.float32)}
    torch_file(tmp_path / "a.pt", weights)
    to_folder(tmp_path / "a.pt", tmp_path / "model", size=16, groups=2, scales=(1, 2, 4))
    assert models.open_model(tmp_path / "model", "tokenizer").module == module
    to_file(tmp_path / "model", tmp_path / "back.safetensors")
    assert_same(load_file(tmp_path / "back.safetensors"), weights)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("encoder.conv_in.weight", None, r"of var, but encoder\.conv_in\.weight is missing"),
        ("decoder.up.3.upsample.conv.bias", None, r"decoder\.up\.3\.upsample\.conv\.bias is missing"),
        ("encoder.mid.attn_1.qkv.bias", np.ones(47, "f4"), r"qkv\.bias has shape \(47,\), expected \(48,\)"),
        ("quantize.quant_resi.qresi_ls.2.bias", None, r"qresi_ls\.2\.bias is missing"),
        ("decoder.up.0.attn.0.norm.bias", np.ones(4, "f4"), r"norm\.bias of shape \(4,\) is not part"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_first_difference(tmp_path, key, value, message):
    refused(tmp_path, change(weights_of("var_vqvae"), key, value), message, **SETTINGS)


def test_released_flexvar_weights_are_refused_by_their_first_difference():
    _, shapes = released("FlexVAE")
    del shapes["quantize.codebook_used"], shapes["decoder.mid.1.q.bias"]
    with pytest.raises(ValueError, match=r"of flexvar, but decoder\.mid\.1\.q\.bias is missing"):
        identify(shapes)
