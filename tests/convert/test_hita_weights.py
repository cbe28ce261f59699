"""Hita's tokenizers and transformers: released keys, there and back, refusals."""

import numpy as np
import pytest
from released import change, names, refused, released, there_and_back, weights_of

from ar_jax.config import load_config
from ar_jax.convert.sources import identify
from ar_jax.files import codec

VARIANTS = {"hita_tok": "v", "hita_ultra": "u"}


@pytest.mark.parametrize("name", names("hita"))
def test_released_checkpoints_have_exactly_these_keys_and_are_the_networks_of_the_configs(name):
    content, shapes = released(name)
    found, stage = identify(shapes), load_config(f"hita:{VARIANTS.get(name, name.split('_')[-1].lower())}")
    assert {**found.keys, **found.buffers} == shapes
    assert (found.family, found.trained) == ("hita", content["num_params"])
    _, info, settings = found.source.describe(found.module)
    ours = found.module
    if found.kind == "tokenizer":
        assert ours.clone(hidden=0) == stage.tokenizer.module.clone(dtype=ours.dtype)
        return
    module = stage.generator.module.complete(stage.tokenizer.module.spec, info)
    assert ours.backbone.clone(hidden=0) == module.backbone.clone(dtype=ours.backbone.dtype, remat="none")
    assert (ours.head.clone(dtype=module.head.dtype), ours.conditioning) == (module.head, module.conditioning)
    assert settings == {
        "order": codec.encode(stage.generator.order),
        "sampling": codec.encode(stage.generator.sampling),
    }


TINY = {"hita_vq": ("--heads", "3", "--groups", "2"), "hita_gpt": ("--heads", "2", "--size", "48")}


@pytest.mark.parametrize("folder", TINY)
def test_there_and_back_changes_no_bit(tmp_path, folder):
    there_and_back(tmp_path, weights_of(folder), *TINY[folder])


@pytest.mark.parametrize(
    ("folder", "key", "value", "message"),
    [
        ("hita_vq", "decode_transformer.norm.bias", None, r"of hita, but decode_transformer\.norm\.bias is missing"),
        ("hita_vq", "encode_transformer.transformer1.layers.0.attn1.to_q.weight", np.ones((25, 24), "f4"), r"no multiple of 3 heads"),
        ("hita_gpt", "slot_embeddings.weight", None, r"generator of hita, but slot_embeddings\.weight is missing"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_its_first_difference(tmp_path, folder, key, value, message):
    refused(tmp_path, change(weights_of(folder), key, value), message, groups=2, heads=3 if "vq" in folder else 2, size=48 if "gpt" in folder else 16)
