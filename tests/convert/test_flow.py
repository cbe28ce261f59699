"""FlowAR, xAR and the pyramid of KL-16: released keys, there and back, buffers, refusals."""

import numpy as np
import pytest
from released import assert_same, change, names, released, weights_of
from safetensors.numpy import load_file, save_file

from ar_jax.convert.__main__ import to_file, to_folder
from ar_jax.convert.sources import export, identify
from ar_jax.files import models
from ar_jax.tokenizers.kl_vae import KLVAE
from ar_jax.tokenizers.latent_pyramid import LatentPyramid

NAMES = [(name, family) for family in ("flowar", "xar") for name in names(family)]
TINY = {"flowar": {"scales": (1, 2, 4)}, "flowar_cross": {"scales": (1, 2, 4)}, "xar": {}}


@pytest.mark.parametrize(("name", "family"), NAMES)
def test_released_checkpoints_have_exactly_these_keys_and_sizes(name, family):
    content, shapes = released(name)
    found = identify(shapes)
    assert (found.family, found.kind, found.trained) == (family, "generator", content["num_params"])
    assert dict(found.buffers) == {key: shapes[key] for key in content["buffers"]}
    assert {**found.keys, **found.buffers} == shapes
    sizes, net = content["hyperparameters"], found.module.backbone
    assert (net.heads, net.decoder_heads) == (sizes["encoder_num_heads"], sizes["decoder_num_heads"])
    assert found.module.spec.n == sum(side**2 for side in sizes.get("scales", [16]))
    assert found.source.describe(found.module)[2]["sampling"]["guidance"]["weight"] > 1


@pytest.mark.parametrize("folder", TINY)
def test_there_and_back_changes_no_bit_and_buffers_are_made_anew(tmp_path, folder):
    weights = weights_of(folder)
    save_file(weights, tmp_path / "a.safetensors")
    to_folder(tmp_path / "a.safetensors", tmp_path / "model", **TINY[folder])
    to_file(tmp_path / "model", tmp_path / "back.safetensors")
    assert_same(load_file(tmp_path / "back.safetensors"), weights)
    found = export(models.open_model(tmp_path / "model", "generator").module, "generator")
    made = found.source.fills(found.module)
    assert made.keys() == found.buffers.keys()
    for key, value in made.items():
        np.testing.assert_allclose(value, weights[key], rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.parametrize(
    ("folder", "key", "value", "settings", "message"),
    [
        ("flowar", "z_proj_ln.weight", None, {}, r"of flowar, but z_proj_ln\.weight is missing"),
        ("flowar", "flownet.res_blocks.1.ada_lin.bias", np.ones(3, "f4"), {}, r"ada_lin\.bias has shape \(3,\)"),
        ("flowar", "encoder_blocks.0.attn.rope.freqs", None, {}, r"heads of encoder_blocks; give --heads"),
        ("flowar", "mask", None, {"scales": ()}, r"places for 21 tokens, which scales \(1, 2, 4, 8, 16\) have not"),
        ("flowar_cross", "flownet.res_blocks.0.crossattn.kv.weight", None, {}, r"crossattn\.kv\.weight is missing"),
        ("xar", "decoder_blocks.0.ada_lin.1.bias", None, {}, r"of xar, but decoder_blocks\.0\.ada_lin\.1\.bias is"),
        ("xar", "encoder_pos_embed_learned", np.ones((1, 20, 24), "f4"), {}, r"20 tokens, which make no square"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_first_difference(folder, key, value, settings, message):
    shapes = {name: entry.shape for name, entry in change(weights_of(folder), key, value).items()}
    with pytest.raises(ValueError, match=message):
        identify(shapes, **TINY[folder] | settings)


def test_kl16_becomes_a_pyramid_with_the_same_parameters():
    _, shapes = released("kl16")
    alone, found = identify(shapes), identify(shapes, scales=(1, 2, 4, 8, 16))
    assert isinstance(alone.module, KLVAE)
    assert found.module == LatentPyramid(alone.module, (1, 2, 4, 8, 16))
    assert found.keys == alone.keys
    with pytest.raises(ValueError, match=r"--scales is \(1, 2\), but the last one must be"):
        identify(shapes, scales=(1, 2))
