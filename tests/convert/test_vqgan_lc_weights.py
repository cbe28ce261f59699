"""VQGAN-LC's tokenizer: released keys, there and back, refusals."""

import numpy as np
import pytest
from released import assert_same, change, refused, released, weights_of
from safetensors.numpy import load_file, save_file

from ar_jax.config import load_config
from ar_jax.convert.__main__ import main
from ar_jax.convert.sources import identify


def test_the_released_checkpoint_has_exactly_these_keys_and_is_the_network_of_the_config():
    content, shapes = released("vqgan_lc_100K_f16")
    found, ours = identify(shapes), load_config("vqgan_lc:f16").tokenizer.module
    assert (dict(found.keys), found.trained) == (shapes, content["num_params"])
    assert found.module == ours.clone(dtype=found.module.dtype)
    assert found.source.describe(found.module)[0].endswith("16x16 codes out of 100000, made of features of width 768")


def test_there_and_back_changes_no_bit(tmp_path, capsys):
    want = weights_of("vqgan_lc")
    save_file(want, tmp_path / "a.safetensors")
    main([str(tmp_path / "a.safetensors"), "--to", str(tmp_path / "model"), "--size", "16", "--groups", "2"])
    assert "tokenizer of vqgan_lc" in capsys.readouterr().out
    main([str(tmp_path / "model"), "--back", str(tmp_path / "back.safetensors")])
    assert_same(load_file(tmp_path / "back.safetensors"), want)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "tok_embeddings.weight",
            np.ones((37, 12), "f4"),
            r"projection\.weight has shape \(4, 11\), expected \(4, 12\)",
        ),
        ("quant_conv.bias", None, r"tokenizer of vqgan_lc, but quant_conv\.bias is missing"),
        ("decoder.up.2.attn.0.q.weight", None, r"its encoder has attention on levels \(-1,\), its decoder on \(\)"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_first_difference(tmp_path, key, value, message):
    refused(tmp_path, change(weights_of("vqgan_lc"), key, value), message, size=16, groups=2)
