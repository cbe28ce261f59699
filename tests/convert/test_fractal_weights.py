"""FractalGen's released files: keys, there and back, refusals."""

import numpy as np
import pytest
from released import change, generator_of, names, refused, released, there_and_back, weights_of

VARIANTS = {
    name: name.removeprefix("fractal").replace("_in", "_").replace("mar_base", "b").replace("mar_large", "l").replace("mar_huge", "h")
    for name in names("fractal")
}


@pytest.mark.parametrize("name", VARIANTS)
def test_released_checkpoints_have_exactly_these_keys_and_are_the_networks_of_the_configs(name):
    words = generator_of(name, f"fractal:{VARIANTS[name]}")[2]
    assert f"of {name[-3:].lstrip('n')}x" in words
    assert ("mean colours" in words) == released(name)[0]["hyperparameters"]["guiding_pixel"]


@pytest.mark.parametrize("folder", ["fractalar", "fractalmar"])
def test_there_and_back_changes_no_bit(tmp_path, folder):
    there_and_back(tmp_path, weights_of(folder), "--heads", "2")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("generator.cond_emb.bias", None, r"generator of fractal, but generator\.cond_emb\.bias is missing"),
        ("fake_latent", np.ones((1, 15), "f4"), r"fake_latent has shape \(1, 15\), expected \(1, 32\)"),
        ("generator.pos_embed_learned", np.ones((1, 8, 32), "f4"), r"places for 3 patches, which make no square"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_first_difference(tmp_path, key, value, message):
    refused(tmp_path, change(weights_of("fractalmar"), key, value), message, heads=2)
