"""DetailFlow's tokenizers and generators: released keys, there and back, the teacher beside them, refusals."""

import math

import jax
import numpy as np
import pytest
from released import assert_same, change, names, released, weights_of
from safetensors.numpy import load_file, save_file

from ar_jax.config import load_config
from ar_jax.convert.__main__ import main, to_folder
from ar_jax.convert.detailflow import BESIDE, features, tokenizer
from ar_jax.convert.sources import identify
from ar_jax.files import codec
from ar_jax.train.teachers import Siglip2


@pytest.mark.parametrize("name", names("detailflow"))
def test_released_checkpoints_have_exactly_these_keys_and_are_the_networks_of_the_configs(name):
    content, shapes = released(name)
    groups, beside = (
        content["hyperparameters"].get("num_latent_tokens", content["hyperparameters"].get("block_size")) // 8,
        0,
    )
    if "repa_model.visual_model.post_layernorm.bias" in shapes:
        assert features(shapes) == Siglip2.tower
        beside = sum(math.prod(shapes.pop(key)) for key in list(shapes) if key.startswith(BESIDE))
    found = identify(shapes, groups=groups)
    assert {**found.keys, **found.buffers} == shapes
    assert (found.family, found.trained) == ("detailflow", content["num_params"] - beside)
    kind = "vq" if found.kind == "tokenizer" else "l"
    stage, ours = load_config(f"detailflow:{kind}_{groups}"), found.module
    _, info, settings = found.source.describe(ours)
    plain = {"dtype": "float32", "remat": "none", "hidden": 0}
    if found.kind == "tokenizer":
        module = stage.tokenizer.module
        for net in ("encoder", "decoder"):
            theirs = getattr(module, net)
            assert getattr(ours, net).clone(**plain) == theirs.clone(**plain)
            assert getattr(ours, net).hidden == (theirs.hidden or 4 * theirs.width)
        assert ours == module.clone(encoder=ours.encoder, decoder=ours.decoder, dtype=ours.dtype)
        return
    module = stage.generator.module.complete(stage.tokenizer.module.spec, info)
    assert ours.backbone.clone(**plain) == module.backbone.clone(**plain)
    assert (ours.inputs.group, ours.conditioning) == (module.inputs.group, module.conditioning)
    np.testing.assert_array_equal(ours.spec.coords, module.spec.coords)
    assert settings == {
        "order": codec.encode(stage.generator.order), "sampling": codec.encode(stage.generator.sampling),
    }  # fmt: skip


TINY = {"detailflow_tokenizer": ("--heads", "2"), "detailflow_gpt": ("--heads", "2", "--groups", "4")}


@pytest.mark.parametrize("folder", TINY)
def test_there_and_back_changes_no_bit_but_leaves_out_the_teacher(tmp_path, folder, capsys):
    weights = weights_of(folder)
    want = {key: value for key, value in weights.items() if not key.startswith(BESIDE)}
    save_file(weights, tmp_path / "a.safetensors")
    main([str(tmp_path / "a.safetensors"), "--to", str(tmp_path / "model"), *TINY[folder]])
    assert ("which lie beside the network" in capsys.readouterr().out) == (len(want) < len(weights))
    main([str(tmp_path / "model"), "--back", str(tmp_path / "back.safetensors")])
    assert_same(load_file(tmp_path / "back.safetensors"), want)


def test_the_teacher_is_read_from_a_released_file(tmp_path):
    weights = weights_of("detailflow_tokenizer")

    class Tiny(Siglip2):
        tower = features({key: value.shape for key, value in weights.items()}, heads=2)

    save_file(weights, tmp_path / "a.safetensors")
    teacher = Tiny(str(tmp_path / "a.safetensors"))
    params = teacher.open()
    assert jax.eval_shape(teacher, params, np.zeros((2, 16, 16, 3), "f4")).shape == (2, 4, 4, 16)
    with pytest.raises(ValueError, match=r"network\.weights is 'none\.pt', which is no file"):
        Tiny("none.pt").open()


@pytest.mark.parametrize(
    ("folder", "key", "value", "message"),
    [
        (
            "detailflow_tokenizer",
            "refine_conv.bias",
            None,
            r"tokenizer of detailflow, but refine_conv\.bias is missing",
        ),
        (
            "detailflow_gpt",
            "layers.1.attention.wo.weight",
            None,
            r"generator of detailflow, but layers\.1\.attention\.wo",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_its_first_difference(tmp_path, folder, key, value, message):
    save_file(change(weights_of(folder), key, value), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        to_folder(tmp_path / "a.safetensors", tmp_path / "model", heads=2)


def test_images_of_another_size_take_the_same_tables():
    shapes = {key: value.shape for key, value in weights_of("detailflow_tokenizer").items()}
    assert (tokenizer(shapes, 0, 2).size, tokenizer(shapes, 16, 2).table) == ((12, 12), 3)
