"""LightGen's released file: its keys, there and back, refusals."""

import numpy as np
import pytest
from released import change, generator_of, names, refused, there_and_back, weights_of

from ar_jax.config import load_config
from ar_jax.data import Info


@pytest.mark.parametrize("name", names("lightgen"))
def test_the_released_checkpoint_has_exactly_these_keys_and_is_the_network_of_the_config(name):
    _, _, words, info = generator_of(name, "lightgen:large")
    assert "16+16+16 layers of width 1024" in words
    assert (info.text_rows, info.text_width) == (128, 4096)


def test_there_and_back_changes_no_bit_and_positions_of_other_sizes_are_those_of_the_file(tmp_path):
    there_and_back(tmp_path, weights_of("lightgen"), "--heads", "2", "--size", "64")


@pytest.mark.parametrize(
    ("key", "value", "size", "message"),
    [
        ("cross_norm.bias", None, 64, r"generator of lightgen, but cross_norm\.bias is missing"),
        ("fake_latent", np.ones((1, 1, 15), "f4"), 64, r"shape \(1, 1, 15\), expected \(1, 1, 16\)"),
        ("fake_latent", np.ones((1, 1, 16), "f4"), 40, r"--size is 40; LightGen needs a multiple of 16 pixels"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_first_difference(tmp_path, key, value, size, message):
    refused(tmp_path, change(weights_of("lightgen"), key, value), message, size=size, heads=2)


def test_data_without_captions_are_refused():
    experiment = load_config("lightgen:large")
    with pytest.raises(ValueError, match=r"Aligned but the data gives no caption features; set data\.text"):
        experiment.generator.module.complete(experiment.tokenizer.module.spec, Info(classes=3))
