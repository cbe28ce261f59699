"""ELM's generators: released keys, there and back, refusals."""

import numpy as np
import pytest
from released import assert_same, change, names, released, weights_of
from safetensors.numpy import load_file, save_file

from ar_jax.config import load_config
from ar_jax.convert.__main__ import main, to_folder
from ar_jax.convert.sources import identify
from ar_jax.files import codec


@pytest.mark.parametrize("name", names("elm"))
def test_released_checkpoints_have_exactly_these_keys_and_are_the_networks_of_the_configs(name):
    content, shapes = released(name)
    found = identify(shapes)
    assert (found.family, found.kind) == ("elm", "generator")
    assert (dict(found.keys), dict(found.buffers), found.trained) == (shapes, {}, content["num_params"])
    experiment = load_config("elm:" + name.removeprefix("ELM-").replace("-", "_").lower())
    words, info, settings = found.source.describe(found.module)
    stage, net = experiment.generator, found.module.backbone
    module = stage.module.complete(experiment.tokenizer.module.spec, info)
    assert net == module.backbone.clone(dtype=net.dtype, remat="none", hidden=net.hidden)
    assert found.module.head == module.head.clone(dtype=net.dtype)
    ours, theirs = ((x.inputs.clone(spec=None), x.conditioning, x.spec.codes) for x in (module, found.module))
    assert theirs == ours
    assert settings == {"order": codec.encode(stage.order), "sampling": codec.encode(stage.sampling)}
    assert f"with {name[-4]} sub-codes of {2 ** int(name[-2:])}, 1000 classes" in words


@pytest.mark.parametrize("sub_codes", [1, 2])
def test_there_and_back_changes_no_bit(tmp_path, sub_codes):
    want = weights_of("elm_gpt")
    if sub_codes == 1:
        want = {key.replace(".0.", ".") if key[0] in "to" else key: x for key, x in want.items()}
        want = {
            key: x for key, x in want.items() if key not in ("proj.weight", "tok_embedder.1.weight", "output.1.weight")
        }
    save_file(want, tmp_path / "a.safetensors")
    main([str(tmp_path / "a.safetensors"), "--to", str(tmp_path / "model"), "--heads", "2", "--size", "48"])
    main([str(tmp_path / "model"), "--back", str(tmp_path / "back.safetensors")])
    assert_same(load_file(tmp_path / "back.safetensors"), want)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("output.1.weight", None, r"generator of elm, but output\.1\.weight is missing"),
        ("output.0.weight", np.ones((9, 32), "f4"), r"output\.0\.weight has shape \(9, 32\), expected \(16, 32\)"),
        (
            "output.2.weight",
            np.ones((16, 32), "f4"),
            r"output\.2\.weight of shape \(16, 32\) is not part of this model",
        ),
        (
            "output.1.weight",
            np.full((16, 32), np.nan, "f4"),
            r"output\.1\.weight \(our head/readout/kernel\) holds NaN",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_its_first_difference(tmp_path, key, value, message):
    save_file(change(weights_of("elm_gpt"), key, value), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        to_folder(tmp_path / "a.safetensors", tmp_path / "model", heads=2, size=48)
