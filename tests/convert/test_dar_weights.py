"""D-AR's tokenizer and generators: released keys, there and back, refusals."""

import numpy as np
import pytest
from released import assert_same, change, names, released, weights_of
from safetensors.numpy import load_file, save_file

from ar_jax.config import load_config
from ar_jax.convert.__main__ import main, to_folder
from ar_jax.convert.sources import identify
from ar_jax.files import codec


@pytest.mark.parametrize("name", names("dar"))
def test_released_checkpoints_have_exactly_these_keys_and_are_the_networks_of_the_configs(name):
    content, shapes = released(name)
    found = identify(shapes, family="dar")
    assert (found.family, found.trained) == ("dar", content["num_params"])
    assert {**found.keys, **found.buffers} == shapes
    experiment = load_config("dar:" + name.removeprefix("D-AR-").removesuffix("_v1").lower())
    words, info, settings = found.source.describe(found.module)
    if found.kind == "tokenizer":
        assert identify(shapes).module == found.module  # which needs not be asked for
        module, nets = experiment.tokenizer.module, ("encoder", "decoder", "painter")
        theirs = {net: getattr(found.module, net) for net in nets}
        plain = {
            name: getattr(module, name).clone(dtype=net.dtype, remat="none", hidden=3072)
            for name, net in theirs.items()
        }
        assert plain == theirs
        assert found.module == module.clone(**plain, dtype=found.module.dtype)
        assert "256x256 pixels to 256 tokens of 16384, 32 for each of 8 steps" in words
    else:
        assert identify(shapes, size=256).family == "llamagen"
        stage, net = experiment.generator, found.module.backbone
        assert net == stage.module.backbone.clone(dtype=net.dtype, remat="none", hidden=net.hidden)
        assert (found.module.spec.n, info.classes) == (experiment.tokenizer.module.spec.n, 1000)
        assert settings == {"order": codec.encode(stage.order), "sampling": codec.encode(stage.sampling)}


@pytest.mark.parametrize("folder", ["dar_tokenizer", "dar_gpt"])
def test_there_and_back_changes_no_bit(tmp_path, folder):
    want = {key: x for key, x in weights_of(folder).items() if ".kv_cache." not in key}
    if folder == "dar_tokenizer":
        random, net = np.random.default_rng(0), "diff_decoder.net.repa_out."
        for i, shape in ((0, (10, 64)), (2, (10, 10)), (4, (6, 10))):
            want |= {
                f"{net}{i}.weight": random.normal(size=shape).astype("f4"),
                f"{net}{i}.bias": np.ones(shape[0], "f4"),
            }
        want["quantize.codebook_used"] = np.arange(5, dtype="f4")
    save_file(want, tmp_path / "a.safetensors")
    options = ["--heads", "4", "--family", "dar"] if folder == "dar_gpt" else ["--size", "24"]
    main([str(tmp_path / "a.safetensors"), "--to", str(tmp_path / "model"), *options])
    main([str(tmp_path / "model"), "--back", str(tmp_path / "back.safetensors")])
    assert_same(load_file(tmp_path / "back.safetensors"), want)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("patchify.bias", None, r"tokenizer of dar, but patchify\.bias is missing"),
        (
            "patchify.weight",
            np.ones((60, 3, 8, 8), "f4"),
            r"width 60 is no multiple of 64, the channels of a head; give --heads",
        ),
        ("patchify.weight", np.ones((64, 3, 8, 4), "f4"), r"patches of 8x4 pixels .* are no squares"),
        (
            "quant_in_conv.weight",
            np.full((4, 64, 1, 1), np.inf, "f4"),
            r"quant_in_conv\.weight \(our to_code/kernel\) holds NaN",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_its_first_difference(tmp_path, key, value, message):
    save_file(change(weights_of("dar_tokenizer"), key, value), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        to_folder(tmp_path / "a.safetensors", tmp_path / "model", size=24)


def test_a_family_that_is_not_known_or_not_the_files_is_refused():
    shapes = {key: x.shape for key, x in weights_of("dar_gpt").items()}
    with pytest.raises(ValueError, match=r"--family is 'd-ar'; it must be one of .*infinity, "):
        identify(shapes, family="d-ar")
    with pytest.raises(ValueError, match=r"not a checkpoint of the family var; its \d+ entries begin with"):
        identify(shapes, family="var")
