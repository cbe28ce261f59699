"""KL-16 and MAR: released keys, there and back."""

import numpy as np
import pytest
from released import assert_same, names, released, weights_of
from safetensors.numpy import load_file, save_file

from ar_jax.convert.__main__ import main, to_file, to_folder
from ar_jax.convert.names import to_params
from ar_jax.convert.sources import export, identify
from ar_jax.data import Info
from ar_jax.files import codec, models
from ar_jax.generators.masked import Masked
from ar_jax.heads.diffusion import Diffusion
from ar_jax.nets.conditioning import Label
from ar_jax.nets.vit import ViT
from ar_jax.orders import OrderFn, Shuffled
from ar_jax.tokenizers.kl_vae import KLVAE
from ar_jax.tokens import TokenSpec, grid


@pytest.mark.parametrize("name", names("mar"))
def test_released_checkpoints_have_exactly_these_keys_and_sizes(name):
    content, shapes = released(name)
    sizes, found = content["hyperparameters"], identify(shapes)
    assert found.keys == shapes
    assert found.trained == content["num_params"]
    words, info, settings = found.source.describe(found.module)
    if name == "kl16":
        assert (found.kind, found.module.scale, found.module.shift) == ("tokenizer", (0.2325,), (0.0,))
        assert "16x16 tokens of 16 numbers" in words
        return
    module = found.module
    assert (found.kind, info.classes) == ("generator", sizes["class_num"])
    assert module.encoder.layers == sizes["encoder_depth"]
    assert module.decoder.heads == sizes["decoder_num_heads"]
    assert (module.head.depth, module.head.width) == (sizes["diffloss_d"], sizes["diffloss_w"])
    assert module.buffer == sizes["buffer_size"]
    assert codec.decode(settings["order"], OrderFn) == Shuffled(64)
    assert settings["sampling"]["guidance"]["weight"] > 2.5


@pytest.mark.parametrize(
    ("folder", "kind", "options"),
    [("kl16_vae", "tokenizer", ("--size", "64", "--groups", "4")), ("mar", "generator", ("--heads", "2"))],
)
def test_there_and_back_changes_no_bit(tmp_path, folder, kind, options, capsys):
    weights = weights_of(folder)
    if kind == "tokenizer":  # what training left in the file is kept, but of no use
        weights["loss.discriminator.main.0.weight"] = np.ones((2, 3, 4, 4), np.float32)
    save_file(weights, tmp_path / "weights.safetensors")
    main([str(tmp_path / "weights.safetensors"), "--to", str(tmp_path / "model"), *options])
    assert f"{kind} of mar" in capsys.readouterr().out
    main([str(tmp_path / "model"), "--back", str(tmp_path / "back.safetensors")])
    assert_same(load_file(tmp_path / "back.safetensors"), weights)
    assert models.open_model(tmp_path / "model", kind).settings["origin"]["family"] == "mar"


def test_levels_of_attention_are_read_from_the_keys(tmp_path):
    vae = KLVAE(
        (16, 16), features=4, mult=(1, 2, 1), res_blocks=1, latent=3, groups=2, encoder_attention=(1, -1),
        decoder_attention=(0, -1), shift=(0.0,), scale=(0.2325,),
    )  # fmt: skip
    found = export(vae, "tokenizer")
    assert {key for key in found.keys if ".attn.0.q.weight" in key} == {
        f"{side}.attn.0.q.weight" for side in ("encoder.down.1", "encoder.down.2", "decoder.up.0", "decoder.up.2")
    }
    assert identify(found.keys, size=16, groups=2).module == vae
    assert identify(released("kl16")[1]).module == KLVAE(shift=(0.0,), scale=(0.2325,)), "its defaults are KL-16"


def test_unequal_widths_come_back(tmp_path):
    numbers = np.random.default_rng(0)
    generator = Masked(ViT(2, 16, 2, hidden=24), ViT(1, 24, 2, hidden=40), Label(16, apart=True), Diffusion(8, 2), 3)
    generator = generator.complete(TokenSpec(grid(3, 3), channels=8), Info(classes=5))
    found = export(generator, "generator")
    weights = {key: numbers.normal(size=shape).astype(np.float32) for key, shape in found.keys.items()}
    save_file(weights, tmp_path / "a.safetensors")
    to_folder(tmp_path / "a.safetensors", tmp_path / "model", heads=2)
    module = models.open_model(tmp_path / "model", "generator").module
    assert (module.encoder.width, module.encoder.hidden, module.decoder.width, module.decoder.hidden) == (
        16,
        24,
        24,
        40,
    )
    to_file(tmp_path / "model", tmp_path / "b.safetensors")
    assert_same(load_file(tmp_path / "b.safetensors"), weights)


def test_keys_that_nobody_asks_for_are_an_error():
    vae = KLVAE((8, 8), features=4, mult=(1, 2), res_blocks=1, latent=3, groups=2)
    found = export(vae, "tokenizer")
    weights = {key: np.zeros(shape, np.float32) for key, shape in found.keys.items()} | {"encoder.extra": np.zeros(2)}
    with pytest.raises(ValueError, match=r"^encoder\.extra is not part of this model"):
        to_params(weights, found.params, found.rules)
    to_params(weights, found.params, found.rules, {"encoder.extra"})
