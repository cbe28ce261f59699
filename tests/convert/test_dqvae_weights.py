"""DQ-VAE's tokenizers and generator: released keys, there and back, refusals."""

import pytest
from released import assert_same, change, refused, released, weights_of
from safetensors.numpy import load_file, save_file

from ar_jax.config import load_config
from ar_jax.convert.__main__ import main
from ar_jax.convert.sources import identify


@pytest.mark.parametrize(
    ("name", "variant"),
    [("dqvae_dual_feature", "features"), ("dqvae_dual_entropy", "entropy"), ("dq_transformer_class_p6c18", "p6c18")],
)
def test_released_checkpoints_have_exactly_these_keys_and_are_the_networks_of_the_configs(name, variant):
    content, shapes = released(name)
    found, ours = identify(shapes), load_config(f"dqvae:{variant}")
    assert ({**found.keys, **found.buffers}, found.trained) == (shapes, content["num_params"])
    if found.kind == "tokenizer":
        assert found.module == ours.tokenizer.module.clone(dtype=found.module.dtype)
    else:
        module = ours.generator.module
        assert (found.module.rows, found.module.codes, found.module.conditioning.classes) == (module.rows, 1024, 1000)
        assert (found.module.places.layers, found.module.contents.heads) == (6, 8)
    assert found.source.describe(found.module)[0]


def weights(folder):
    found = weights_of(folder)
    return {f"transformer.{key}": value for key, value in found.items()} if folder == "dq_transformer" else found


@pytest.mark.parametrize(("folder", "options"), [("dqvae", ["--groups", "2"]), ("dq_transformer", ["--heads", "2"])])
def test_there_and_back_changes_no_bit(tmp_path, capsys, folder, options):
    want = weights(folder)
    save_file(want, tmp_path / "a.safetensors")
    main([str(tmp_path / "a.safetensors"), "--to", str(tmp_path / "model"), *options])
    assert "of dqvae" in capsys.readouterr().out
    main([str(tmp_path / "model"), "--back", str(tmp_path / "back.safetensors")])
    assert_same(load_file(tmp_path / "back.safetensors"), want)


@pytest.mark.parametrize(
    ("folder", "key", "rows", "message"),
    [
        (
            "dqvae",
            "decoder.up.1.attn.0.q.weight",
            None,
            r"attention on levels \[1, 2\], its decoder on \[\]; it must be the",
        ),
        ("dqvae", "quantize.codebook.embed_ema", 3, r"embed_ema has shape \(3, 5\), expected \(23, 5\)"),
        ("dqvae", "encoder.router.gate.2.bias", None, r"encoder\.router\.gate\.2\.bias is missing"),
        (
            "dq_transformer",
            "transformer.content_fine_pos_emb.weight",
            3,
            r"which are no square of cells with four places",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_its_first_difference(tmp_path, folder, key, rows, message):
    want = weights(folder)
    refused(tmp_path, change(want, key, None if rows is None else want[key][:rows]), message, groups=2, heads=2)
