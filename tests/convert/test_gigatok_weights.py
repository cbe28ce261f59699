"""GigaTok's tokenizers and transformers: released keys, there and back, refusals."""

import numpy as np
import pytest
from released import change, names, refused, released, there_and_back, weights_of

from ar_jax.config import load_config
from ar_jax.convert.sources import identify
from ar_jax.files import codec

SIZES = {"SS": "s_s", "SB": "s_b", "BL": "b_l", "XLXXL": "xl_xxl", "B": "gpt_b", "XL": "gpt_xl", "XXL": "gpt_xxl"}


def plain(net, **fields):
    return net.clone(dtype="float32", hidden=0, remat="none", **fields)


@pytest.mark.parametrize("name", names("gigatok"))
def test_released_checkpoints_have_exactly_these_keys_and_are_the_networks_of_the_configs(name):
    content, shapes = released(name)
    found = identify(shapes)
    stage = load_config(f"gigatok:{SIZES[name.split('_')[-1].removesuffix('256')]}")
    assert {**found.keys, **found.buffers} == shapes
    assert (found.family, found.trained) == ("gigatok", content["num_params"])
    _, info, settings = found.source.describe(found.module)
    ours = found.module
    if found.kind == "tokenizer":
        module = stage.tokenizer.module
        for net in ("encoder_net", "decoder_net"):
            assert plain(getattr(ours, net)) == plain(getattr(module, net))
        rest = {"encoder_net": ours.encoder_net, "decoder_net": ours.decoder_net, "vq": ours.vq, "dtype": ours.dtype}
        assert ours == module.clone(rotation=True, **rest)
        return
    module = stage.generator.module.complete(stage.tokenizer.module.spec, info)
    assert plain(ours.backbone) == plain(module.backbone)
    assert (ours.spec.n, ours.spec.codes, ours.conditioning) == (256, (16384,), module.conditioning)
    assert settings == {
        "order": codec.encode(stage.generator.order),
        "sampling": codec.encode(stage.generator.sampling),
    }


TINY = {"gigatok_gpt": ("--heads", "4"), "gigatok_vq": ("--heads", "3", "--groups", "4")}


@pytest.mark.parametrize("folder", TINY)
def test_there_and_back_changes_no_bit(tmp_path, folder):
    there_and_back(tmp_path, weights_of(folder), *TINY[folder])


@pytest.mark.parametrize(
    ("folder", "key", "value", "message"),
    [
        ("gigatok_vq", "s1to2decoder.ln_post.bias", None, r"of gigatok, but s1to2decoder\.ln_post\.bias is missing"),
        ("gigatok_vq", "s1to2decoder.distill_mlp.4.weight", None, r"s1to2decoder\.distill_mlp\.0\.bias .* is not part"),
        ("gigatok_gpt", "positional_embedding", np.ones((1, 32), "f4"), r"has 1 rows, which leaves none for a token"),
        ("gigatok_gpt", "layers.1.attention.wo.weight", None, r"but layers\.1\.attention\.wo\.weight is missing"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_its_first_difference(tmp_path, folder, key, value, message):
    refused(tmp_path, change(weights_of(folder), key, value), message, groups=4, heads=4)
