"""FractalGen's released files: keys, there and back, refusals."""

import numpy as np
import pytest
from released import change, names, refused, released, there_and_back, weights_of

from ar_jax.config import load_config
from ar_jax.convert.sources import export, identify
from ar_jax.files import codec

VARIANTS = {
    name: name.removeprefix("fractal").replace("_in", "_").replace("mar_base", "b").replace("mar_large", "l").replace("mar_huge", "h")
    for name in names("fractal")
}


@pytest.mark.parametrize("name", VARIANTS)
def test_released_checkpoints_have_exactly_these_keys_and_are_the_networks_of_the_configs(name):
    content, shapes = released(name)
    found = identify(shapes)
    assert (found.family, found.kind) == ("fractal", "generator")
    assert (dict(found.keys), found.trained) == (shapes, content["num_params"])
    experiment = load_config(f"fractal:{VARIANTS[name]}")
    words, info, settings = found.source.describe(found.module)
    assert f"of {name[-3:].lstrip('n')}x" in words
    assert ("mean colours" in words) == content["hyperparameters"]["guiding_pixel"]
    stage = experiment.generator
    assert export(stage.module.complete(experiment.tokenizer.module.spec, info), "generator").keys == shapes
    assert settings == {"order": codec.encode(stage.order), "sampling": codec.encode(stage.sampling)}


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
