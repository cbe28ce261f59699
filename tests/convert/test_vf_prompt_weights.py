"""VF prompt's tokenizer: LlamaGen's, for images of two sizes."""

import pytest
from released import assert_same, weights_of
from safetensors.numpy import load_file, save_file

from ar_jax.convert.__main__ import main, to_folder
from ar_jax.convert.sources import identify
from ar_jax.files.models import open_model
from ar_jax.tokenizers.two_sizes import TwoSizes


def test_the_tokenizer_is_llamagens_for_images_of_two_sizes(tmp_path):
    weights = weights_of("llamagen_vq")
    shapes, options = {key: value.shape for key, value in weights.items()}, {"size": 64, "groups": 4, "family": "vf_prompt"}
    assert identify(shapes, size=64, groups=4).family == "llamagen"
    save_file(weights, tmp_path / "a.safetensors")
    side = identify(shapes, size=64, groups=4).module.grid[0]
    to_folder(tmp_path / "a.safetensors", tmp_path / "model", scales=(2, side), **options)
    module = open_model(tmp_path / "model", "tokenizer").module
    assert isinstance(module, TwoSizes)
    assert module.spec.scales == ((2, 2), (side, side))
    main([str(tmp_path / "model"), "--back", str(tmp_path / "back.safetensors")])
    assert_same(load_file(tmp_path / "back.safetensors"), weights)
    with pytest.raises(ValueError, match=r"--scales is not given; give the sides of the small picture and of the image's"):
        identify(shapes, size=64, groups=4, family="vf_prompt")
