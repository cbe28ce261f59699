"""Halton-MaskGIT's generators: released keys, there and back, refusals."""

import numpy as np
import pytest
from released import change, generator_of, names, refused, there_and_back, weights_of


@pytest.mark.parametrize("name", names("halton"))
def test_released_checkpoints_have_exactly_these_keys_and_are_the_networks_of_the_configs(name):
    pixels, size = name.split("_")[-2:]
    found, ours, words, _ = generator_of(name, f"halton:{size[0]}_{pixels}", buffers=("head.weight",))
    plain = found.module.backbone
    net = ours.backbone.clone(dtype=plain.dtype, remat="none", hidden=plain.hidden)
    assert found.module == ours.clone(backbone=net)
    assert "tokens of 16384 codes, 1000 classes" in words


def test_there_and_back_changes_no_bit(tmp_path, capsys):
    there_and_back(tmp_path, weights_of("halton_maskgit"), "--heads", "3")
    assert "generator of halton, 2 layers of width 24 with 3 heads, 5x5 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("head.bias", None, r"of halton, but head\.bias is missing"),
        (
            "head.weight",
            np.ones((18, 24), "f4"),
            r"head\.weight and tok_emb\.weight differ, but are the same parameters",
        ),
        ("pos_emb.weight", np.ones((24, 24), "f4"), r"places for 24 tokens, which make no square"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_first_difference(tmp_path, key, value, message):
    refused(tmp_path, change(weights_of("halton_maskgit"), key, value), message, heads=3)


def test_a_width_that_was_not_published_needs_the_number_of_heads(tmp_path):
    message = r"its width is 24, and published models have 384, 512, 768, 1024: give --heads"
    refused(tmp_path, weights_of("halton_maskgit"), message)
