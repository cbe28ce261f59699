"""Instella-T2I's tokenizer and generators: released keys, there and back, refusals."""

import numpy as np
import pytest
from released import assert_same, change, names, released, weights_of
from safetensors.numpy import load_file, save_file

from ar_jax.config import load_config
from ar_jax.convert.__main__ import main, to_folder
from ar_jax.convert.sources import identify
from ar_jax.files import codec


@pytest.mark.parametrize("name", names("instella"))
def test_released_checkpoints_have_exactly_these_keys_and_are_the_networks_of_the_configs(name):
    content, shapes = released(name)
    found = identify(shapes)
    variant = name.removeprefix("instella_")
    assert (found.family, found.kind) == ("instella", "tokenizer" if variant == "bae" else "generator")
    assert {**found.keys, **found.buffers} == shapes
    unused = sum(int(np.prod(shape)) for shape in found.buffers.values())
    assert found.trained + unused == content["num_params"]
    experiment = load_config(f"instella:{variant}")
    words, info, settings = found.source.describe(found.module)
    if variant == "bae":
        ours = experiment.tokenizer.module
        nets = {side: getattr(ours, side).clone(dtype=np.float32, remat="none") for side in ("encoder", "decoder")}
        assert found.module.clone(dtype=np.float32, **{side: getattr(found.module, side).clone(dtype=np.float32) for side in nets}) == (
            ours.clone(dtype=np.float32, temperature=1.0, **nets)
        )  # fmt: skip
        return
    stage = experiment.generator
    module = stage.module.complete(experiment.tokenizer.module.spec, info)
    theirs, ours = (x.clone(spec=None, backbone=x.backbone.clone(dtype=np.float32, remat="none")) for x in (found.module, module))
    if variant == "ar":
        theirs, ours = (
            x.clone(inputs=x.inputs.clone(spec=None), head=x.head.clone(dtype=np.float32)) for x in (theirs, ours)
        )
    assert theirs == ours
    assert settings == {"order": codec.encode(stage.order), "sampling": codec.encode(stage.sampling)}
    assert "128 tokens of 64 bits, 128 caption rows of 32768" in words


@pytest.mark.parametrize("name", ["bae", "ar", "diff"])
def test_there_and_back_changes_no_bit(tmp_path, name):
    want = weights_of(f"instella_{name}")
    save_file(want, tmp_path / "a.safetensors")
    size = ["--size", "12"] if name == "bae" else []
    main([str(tmp_path / "a.safetensors"), "--to", str(tmp_path / "model"), *size])
    main([str(tmp_path / "model"), "--back", str(tmp_path / "back.safetensors")])
    assert_same(load_file(tmp_path / "back.safetensors"), want)


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("bae", "encoder.transformer_blocks.2.attn.norm_q.weight", None, r"of instella, but encoder\.transformer_blocks\.2\.attn\.norm_q\.weight is missing"),
        ("bae", "decoder.transformer_blocks.2.attn.q_proj.weight", np.full((24, 24), np.nan, "f4"), r"decoder\.transformer_blocks\.2\.attn\.q_proj\.weight \(our decoder/blocks_after/attention/query/kernel\) holds NaN"),
        ("ar", "proj_out.weight", np.ones((7, 24), "f4"), r"proj_out\.weight has shape \(7, 24\), expected \(6, 24\)"),
        ("diff", "split_token", np.ones((1, 1, 24), "f4"), r"generator of instella, but .* is missing"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_its_first_difference(tmp_path, name, key, value, message):
    save_file(change(weights_of(f"instella_{name}"), key, value), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        to_folder(tmp_path / "a.safetensors", tmp_path / "model", size=12 if name == "bae" else 0)
