"""FQGAN's tokenizers and FAR: released keys, there and back, refusals."""

import numpy as np
import pytest
from released import change, names, refused, released, there_and_back, weights_of

from ar_jax.config import load_config
from ar_jax.convert.sources import identify
from ar_jax.files import codec


@pytest.mark.parametrize("name", names("fqgan"))
def test_released_checkpoints_have_exactly_these_keys_and_are_the_networks_of_the_configs(name):
    content, shapes = released(name)
    found, experiment = identify(shapes), load_config(f"fqgan:{name.removeprefix('fqgan_').lower()}")
    assert {**found.keys, **found.buffers} == shapes
    assert (found.family, found.trained) == ("fqgan", content["num_params"])
    _, info, settings = found.source.describe(found.module)
    if found.kind == "tokenizer":
        assert found.module == experiment.tokenizer.module.clone(dtype=found.module.dtype)
        return
    stage, ours = experiment.generator, found.module
    module, plain = stage.module.complete(experiment.tokenizer.module.spec, info), {"remat": "none"}
    assert ours.backbone.clone(hidden=0) == module.backbone.clone(dtype=ours.backbone.dtype, **plain)
    assert ours.head.net.clone(hidden=0) == module.head.net.clone(dtype=ours.head.net.dtype, **plain)
    assert (ours.head.codes, ours.conditioning) == (module.head.codes, module.conditioning)
    assert settings == {"order": codec.encode(stage.order), "sampling": codec.encode(stage.sampling)}


TINY = {"fqgan_triple_vq": ("--heads", "4", "--groups", "2"), "fqgan_dual_far": ("--heads", "3", "--size", "48")}


@pytest.mark.parametrize("folder", TINY)
def test_there_and_back_changes_no_bit(tmp_path, folder):
    there_and_back(tmp_path, weights_of(folder), *TINY[folder])


@pytest.mark.parametrize(
    ("folder", "key", "value", "message"),
    [
        ("fqgan_dual_vq", "quant_conv_sem.bias", None, r"of fqgan, but quant_conv_sem\.bias is missing"),
        ("fqgan_triple_vq", "mid_sem_feat_pred.class_embedding", None, r"mid_sem_feat_pred is missing beside high_sem"),
        ("fqgan_dual_vq", "quantize_sem.embedding.weight", np.ones((30, 5), "f4"), r"shape \(30, 5\), expected \(30, 6\)"),
        ("fqgan_dual_vq", "encoder.visual_head.0.positional_embedding", np.ones((16, 16), "f4"), r"size is 48, but its positions are of images of 64"),
        ("fqgan_dual_far", "output_2.weight", None, r"generator of fqgan, but output_2\.weight is missing"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_its_first_difference(tmp_path, folder, key, value, message):
    refused(tmp_path, change(weights_of(folder), key, value), message, size=48, groups=2, heads=3 if "far" in folder else 4)
