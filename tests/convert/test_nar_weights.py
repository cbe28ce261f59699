"""NAR's transformers: released keys, there and back, refusals."""

import numpy as np
import pytest
from released import change, names, refused, released, there_and_back, weights_of

from ar_jax.config import load_config
from ar_jax.convert.sources import identify
from ar_jax.files import codec


@pytest.mark.parametrize("name", names("nar"))
def test_released_checkpoints_have_exactly_these_keys_and_are_the_networks_of_the_configs(name):
    content, shapes = released(name)
    model, *text, size = name.removeprefix("nar_").replace("c2i_", "").split("_")
    variant = f"xl_t2i_{size}" if text else f"{model.lower()}_{size}"
    found = identify(shapes, size=int(size), heads=content["hyperparameters"]["n_head"])
    assert (found.family, found.kind, found.trained) == ("nar", "generator", content["num_params"])
    assert dict(found.keys) == shapes
    _, info, settings = found.source.describe(found.module)
    stage = load_config(f"nar:{variant}").generator
    ours, module = found.module, stage.module.complete(found.module.spec, info)
    hidden = ours.backbone.hidden
    assert ours.backbone == module.backbone.clone(dtype=ours.backbone.dtype, remat="none", hidden=hidden)
    assert (ours.conditioning, ours.head.axes) == (module.conditioning, 2)
    assert settings == {"order": codec.encode(stage.order), "sampling": codec.encode(stage.sampling)}


def test_there_and_back_changes_no_bit(tmp_path):
    there_and_back(tmp_path, weights_of("nar_c2i"), "--heads", "3", "--size", "48")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("medusa_norm.weight", None, r"of nar, but medusa_norm\.weight is missing"),
        ("layers.2.attention.wo.weight", None, r"generator of nar, but layers\.2\.attention\.wo\.weight is missing"),
        ("medusa_output.weight", np.ones((41, 48), "f4"), r"has shape \(41, 48\), expected \(40, 48\)"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_first_difference(tmp_path, key, value, message):
    refused(tmp_path, change(weights_of("nar_c2i"), key, value), message, heads=3, size=48)
