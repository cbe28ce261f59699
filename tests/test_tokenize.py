import dataclasses
import functools
import json
import shutil
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ar_jax import tokenize
from ar_jax.convert.sources import param_shapes
from ar_jax.data import Data, Info, batches, centre_crop, flip, open_records, open_source, ten_crop
from ar_jax.files import models
from ar_jax.files.images import to_float
from ar_jax.generators.causal import Causal
from ar_jax.heads.gaussian_mixture import GaussianMixture
from ar_jax.machine.precision import products
from ar_jax.nets.conditioning import Label
from ar_jax.nets.transformer import Transformer
from ar_jax.orders import raster
from ar_jax.tokenizers.kl_vae import KLVAE
from ar_jax.tokenizers.latent_pyramid import LatentPyramid
from ar_jax.tokenizers.pyramid import Pyramid
from ar_jax.tokenizers.residual_pyramid import ResidualPyramid
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.tokens import TokenSpec, grid
from ar_jax.train.checkpoint import save_params
from ar_jax.train.recipes import generator_loss

SIZE, COUNT = 8, 10


NET = {
    "size": (SIZE, SIZE),
    "features": 4,
    "mult": (1, 1),
    "res_blocks": 0,
    "codes": 32,
    "code_features": 4,
    "groups": 2,
}
GRID = VQGAN(latent=4, **NET)


def tokenizer_folder(folder, images, seed=0, module=GRID):
    """A tiny tokenizer with random weights, large enough that images differ in their codes."""
    rng = np.random.default_rng(seed)
    shapes = param_shapes(module)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), shapes)
    data = dataclasses.asdict(Data(name="image_folder", path=str(images), size=SIZE, crop="random", flip=True))
    models.describe(folder, "tokenizer", module, Info(), {"data": data})
    save_params(folder / "params", params)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenize")
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        file = root / "images" / f"class{i % 2}" / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + i, 24, 3), np.uint8)).save(file)
    tokenizer_folder(root / "vq", root / "images")
    return root


def cache(place, out, *options):
    tokenize.main([str(place / "vq"), "--out", str(out), *map(str, options)])
    return open_records(out)


@functools.cache
def encoder(folder):
    model = models.open_model(folder, "tokenizer")
    return jax.jit(lambda image: model.module.apply({"params": model.params()}, to_float(image), method="encode"))


def encoded(place, image):
    """Tokens of uint8 images, one by one and straight from the tokenizer."""
    return np.concatenate([encoder(place / "vq")(jnp.asarray(one[None])) for one in image])


def source_of(place):
    return open_source(Data(name="image_folder", path=str(place / "images"), size=SIZE))


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_cached_tokens_are_those_of_the_tokenizer(place, tmp_path, capsys):
    records, source = cache(place, tmp_path / "out", "--batch", 4, "--shards", 3), source_of(place)
    assert len(records) == COUNT
    for i in range(COUNT):
        image = centre_crop(source[i]["image"], SIZE)
        assert records[i]["tokens"].dtype == np.uint8
        assert records[i]["label"] == source[i]["label"]
        np.testing.assert_array_equal(records[i]["tokens"], encoded(place, image[None]))
    assert len({records[i]["tokens"].tobytes() for i in range(COUNT)}) > COUNT // 2  # the test could fail
    assert "1 of each, 16 tokens of codes 32 as uint8" in capsys.readouterr().out


@pytest.mark.parametrize("network", [ResidualPyramid, functools.partial(Pyramid, latent=4)])
def test_pyramids_are_cached_with_all_their_scales(place, tmp_path, network, capsys):
    tokenizer_folder(tmp_path / "vq", place / "images", module=network(scales=(1, 2, 4), **NET))
    tokenize.main([str(tmp_path / "vq"), "--out", str(tmp_path / "out"), "--batch", "4"])
    assert "1 of each, 21 tokens of codes 32 as uint8" in capsys.readouterr().out
    records, image = open_records(tmp_path / "out"), centre_crop(source_of(place)[5]["image"], SIZE)
    expected = encoder(tmp_path / "vq")(jnp.asarray(image[None]))
    np.testing.assert_array_equal(records[5]["tokens"], expected)
    assert len({records[i]["tokens"].tobytes() for i in range(COUNT)}) > COUNT // 2
    data = Data(name="tokens", path=str(tmp_path / "out"))
    tokenize.check_cache(data, models.open_model(tmp_path / "vq", "tokenizer"))
    assert next(batches(open_source(data), data, batch=5, seed=0))["tokens"].shape == (5, 21, 1)


class Pairs(nn.Module):
    """Tokens of two sub-codes: the brightness of quarters of an image, and its contrast."""

    spec = TokenSpec(grid(2, 2), codes=(16, 70000))

    def encode(self, image, key=None):
        parts = image.reshape(len(image), 2, SIZE // 2, 2, SIZE // 2, 3)
        mean, spread = ((f((2, 4, 5)) + 1).reshape(len(image), 4) for f in (parts.mean, parts.std))
        return jnp.stack([7 * mean, 30000 * spread], axis=-1).astype(jnp.int32)


def test_tokens_of_several_sub_codes_are_cached(place):
    data = Data(name="image_folder", path=str(place / "images"), size=SIZE)
    cached = tokenize.Cache(Pairs(), {}, open_source(data), tokenize.Options("nowhere", data, batch=4))
    images = source_of(place)
    records = list(cached[0:COUNT])
    assert len(records) == COUNT
    for i, record in enumerate(records):
        assert record["tokens"].shape == (1, 4, 2)
        assert record["tokens"].dtype == np.uint32, "70,000 codes do not fit in 16 bits"
        image = centre_crop(images[i]["image"], SIZE)
        np.testing.assert_allclose(record["tokens"][0], Pairs().encode(to_float(image[None]))[0], atol=1)


def test_mirror_images_are_second_versions(place, tmp_path):
    records, source = cache(place, tmp_path / "out", "--flip", "--batch", 3), source_of(place)
    image = centre_crop(source[4]["image"], SIZE)
    np.testing.assert_array_equal(records[4]["tokens"], encoded(place, np.stack([image, flip(image)])))


def test_ten_crops_of_every_scale_are_kept_in_order(place, tmp_path):
    records = cache(place, tmp_path / "out", "--crops", 10, "--scales", 1.1, 1.3, "--batch", 7)
    image = source_of(place)[3]["image"]
    crops = np.concatenate([ten_crop(centre_crop(image, side), SIZE) for side in (8, 10)])
    assert len(crops) == 20
    np.testing.assert_array_equal(records[3]["tokens"], encoded(place, crops))


def test_an_interrupted_cache_goes_on_to_the_same_files(place, tmp_path):
    out = tmp_path / "out"
    cache(place, out, "--batch", 4, "--shards", 3)
    before = content(out)
    info = json.loads((out / "info.json").read_text())
    info.pop("count")
    (out / "unfinished.json").write_text(json.dumps(info))
    (out / "info.json").unlink()
    (out / "shard-00001-of-00003.json").unlink()  # killed while it wrote this shard
    (out / "shard-00001-of-00003.tokens.npy").write_bytes(b"cut short")
    with pytest.raises(FileNotFoundError, match="interrupted"):
        open_records(out)
    kept = (out / "shard-00000-of-00003.tokens.npy").stat().st_mtime_ns
    cache(place, out, "--batch", 4, "--shards", 3)
    assert content(out) == before
    assert (out / "shard-00000-of-00003.tokens.npy").stat().st_mtime_ns == kept
    with pytest.raises(SystemExit, match="already holds other records"):
        cache(place, out, "--flip", "--shards", 3)


def test_training_reads_the_cache(place, tmp_path):
    records = cache(place, tmp_path / "out", "--flip")
    data = Data(name="tokens", path=str(tmp_path / "out"))
    source = open_source(data)
    assert source.info.classes == 2
    seen = set()
    stream = batches(source, data, batch=5, seed=0)
    for _ in range(8):
        batch = next(stream)
        assert batch["tokens"].shape == (5, 16, 1)
        assert batch["tokens"].dtype == np.int32
        assert batch["label"].shape == (5,)
        seen |= {row.astype(np.uint8).tobytes() for row in batch["tokens"]}
    known = {version.tobytes() for i in range(COUNT) for version in records[i]["tokens"]}
    assert seen <= known
    assert len(seen) > COUNT  # both versions are drawn


def test_another_tokenizer_is_refused(place, tmp_path):
    cache(place, tmp_path / "out")
    data = Data(name="tokens", path=str(tmp_path / "out"))
    tokenize.check_cache(data, models.open_model(place / "vq", "tokenizer"))
    moved = shutil.copytree(place / "vq", tmp_path / "moved")
    settings = json.loads((moved / "model.json").read_text()) | {"settings": {}, "versions": {}}
    (moved / "model.json").write_text(json.dumps(settings))
    tokenize.check_cache(data, models.open_model(moved, "tokenizer"))  # the same one elsewhere

    other = models.open_model(tokenizer_folder(tmp_path / "vq2", place / "images", seed=5), "tokenizer")
    with pytest.raises(ValueError, match=r"made by another tokenizer .* their parameters differ"):
        tokenize.check_cache(data, other)
    wider = dataclasses.replace(other, module=other.module.clone(size=(32, 32)))
    with pytest.raises(ValueError, match=r"module\.size is \[8, 8\] there and \[32, 32\] here"):
        tokenize.check_cache(data, wider)


@pytest.mark.parametrize("asked", ["highest", "default"])
def test_codes_are_made_in_float32_unless_told_otherwise(place, tmp_path, asked):
    seen = set()

    def listen(call, arguments, keywords, context):
        if context.method_name == "encode":
            seen.add(jax.config.jax_default_matmul_precision)
        return call(*arguments, **keywords)

    with nn.intercept_methods(listen):
        cache(place, tmp_path / "out", *(["--precision", asked] if asked == "default" else []))
    assert seen == {"highest" if asked == "highest" else None}
    assert json.loads((tmp_path / "out" / "info.json").read_text())["products"] == "float32", "as CPUs always multiply"
    assert products("highest", "gpu") == products("default", "cpu") == "float32"
    assert products("default", "gpu") != products("default", "tpu") != products("tensorfloat32", "tpu")


def test_splits_encoded_in_different_precision_are_refused(place, tmp_path):
    for split in ("train", "val"):
        cache(place, tmp_path / split)
    data, tokenizer = Data(name="tokens", path=str(tmp_path)), models.open_model(place / "vq", "tokenizer")
    tokenize.check_cache(data, tokenizer)
    info = json.loads((tmp_path / "val" / "info.json").read_text())
    (tmp_path / "val" / "info.json").write_text(json.dumps(info | {"products": products("default", "tpu")}))
    with pytest.raises(ValueError, match=r"train with products in float32, .*val with products in default on tpu"):
        tokenize.check_cache(data, tokenizer)
    del info["products"]  # of versions that did not say
    (tmp_path / "val" / "info.json").write_text(json.dumps(info))
    tokenize.check_cache(data, tokenizer)


def test_a_cache_written_before_a_field_came_is_read(place, tmp_path, monkeypatch):
    cache(place, tmp_path / "out")
    data = Data(name="tokens", path=str(tmp_path / "out"))
    source = tokenize.tokens(data)
    for part in source.parts:
        del part.info["tokenizer"]["module"]["l2_norm"]
    monkeypatch.setattr(tokenize, "tokens", lambda data: source)
    tokenize.check_cache(data, models.open_model(place / "vq", "tokenizer"))


def test_unreadable_images_are_refused_or_left_out(place, tmp_path, capsys):
    images = shutil.copytree(place / "images", tmp_path / "images")
    (images / "class1" / "03.png").write_bytes(b"broken")
    options = ("--data.path", images, "--batch", 4, "--shards", 2)
    with pytest.raises(SystemExit, match=r"03\.png"):
        cache(place, tmp_path / "refused", *options)
    assert not (tmp_path / "refused" / "info.json").exists()
    records = cache(place, tmp_path / "out", *options, "--data.unreadable", "skip")
    assert len(records) == COUNT - 1
    assert "left out 1 that cannot be read" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"more than data\.unreadable_limit=0"):
        cache(place, tmp_path / "limit", *options, "--data.unreadable", "skip", "--data.unreadable-limit", 0)


def test_captions_and_their_features_are_kept(place, tmp_path):
    images = shutil.copytree(place / "images", tmp_path / "images")
    files = sorted(path.relative_to(images) for path in images.rglob("*.png"))
    lines = [json.dumps({"file": str(file), "caption": f"number {i}"}) for i, file in enumerate(files)]
    (images / "captions.jsonl").write_text("\n".join(lines))
    features, mask = np.random.default_rng(0).random((COUNT, 3, 5), np.float32), np.ones((COUNT, 3), bool)
    features[1, 0], mask[1, 0] = 0, False
    np.savez(tmp_path / "text.npz", features=features, mask=mask)
    text = ("--data.path", images, "--data.text", tmp_path / "text.npz", "--data.text-rows", 3)
    records = cache(place, tmp_path / "out", *text)
    assert records[2]["caption"] == "number 2"
    rounded = features.astype(jnp.bfloat16)
    np.testing.assert_array_equal(records[2]["text"], rounded[2])
    data = Data(name="tokens", path=str(tmp_path / "out"))
    batch = next(batches(open_source(data), data, batch=4, seed=0))
    assert (batch["text"].dtype, batch["text"].shape) == (jnp.bfloat16, (4, 3, 5))
    assert set(batch["text_mask"].sum(1)) <= {2, 3}
    kept = sum(np.load(path).nbytes for path in (tmp_path / "out").rglob("*.text.npy"))
    assert kept == 2 * mask.sum() * 5, "two bytes a number, of real rows only"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.size", "32"], "data.size is 32, but the tokenizer takes images of 8x8"),
        (["--data.flip"], "give --flip or --crops 10"),
        (["--crops", "10", "--flip"], "leave out --flip"),
        (["--crops", "10", "--scales", "0.9"], "at least 1 times"),
        (["--batch", "0"], "batch is 0; it must be a whole number from 1 to"),
        (["--shards", "0"], "shards is 0; it must be a whole number from 1 to"),
        (["--data.name", "image_foldr"], "image_folder"),
    ],
)
def test_bad_options_are_explained(place, tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        cache(place, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="does not exist; a tokenizer is needed"):
        tokenize.main([str(tmp_path / "nothing"), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="give TOKENIZER first"):
        tokenize.main(["--out", str(tmp_path / "out")])


def test_token_types():
    def dtype(codes=(), draws=False):
        spec = TokenSpec(np.zeros((4, 3), np.int32), codes=codes, channels=0 if codes else 16)
        return tokenize.kept_dtype(SimpleNamespace(spec=spec, draws=draws))

    assert [dtype((2**bits,)) for bits in (8, 16)] == [np.uint8, np.uint16]
    assert [dtype((2**bits + 1,)) for bits in (8, 16)] == [np.uint16, np.uint32]
    assert dtype() == np.float32
    assert dtype(draws=True) == np.float16


VAE = KLVAE((SIZE, SIZE), features=4, mult=(1, 1), res_blocks=0, latent=2, groups=2, shift=(0.1, 0.2), scale=(0.5, 2.0))


@pytest.mark.parametrize("module", [VAE.clone(patch=2), LatentPyramid(VAE, scales=(1, 2, 4))])
def test_what_is_drawn_from_cached_moments_is_what_encoding_draws(place, tmp_path, module, capsys):
    tokenizer_folder(tmp_path / "vae", place / "images", module=module)
    tokenize.main([str(tmp_path / "vae"), "--out", str(tmp_path / "out"), "--batch", "4", "--flip"])
    assert "numbers, mean and log-variance as float16" in capsys.readouterr().out
    model, data = models.open_model(tmp_path / "vae", "tokenizer"), Data(name="tokens", path=str(tmp_path / "out"))
    tokenize.check_cache(data, model)
    source = open_source(data)
    assert {name: x.dtype for name, x in source[0].items() if name != "label"} == {"moments": np.float16}
    batch = next(batches(source, data, batch=COUNT, seed=0, train=False))
    images = np.stack([centre_crop(source_of(place)[i]["image"], SIZE) for i in range(COUNT)])
    for seed in range(2):
        key = jax.random.key(seed)
        drawn = module.apply({"params": model.params()}, batch["moments"], key=key, method="drawn")
        expected = module.apply({"params": model.params()}, to_float(images), key=key, method="encode")
        np.testing.assert_allclose(drawn, expected, atol=5e-3 * np.abs(expected).max())
    stream = batches(source, data, batch=5, seed=0)
    seen = {row.tobytes() for _ in range(8) for row in next(stream)["moments"]}
    assert len(seen) > COUNT, "both versions are drawn"


def test_training_draws_from_cached_moments_as_from_images():
    generator = Causal(Transformer(1, 8, 2, hidden=12), Label(8), GaussianMixture(2)).complete(
        VAE.spec, Info(classes=2)
    )
    params, frozen = generator.init_params(jax.random.key(0)), VAE.init_params(jax.random.key(1))
    loss = jax.jit(generator_loss(generator, VAE, raster, 0.1))
    image = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)
    kept = np.asarray(tokenize.kept(VAE, frozen, image, None))
    assert (kept.dtype, kept.shape) == (np.float16, (3, 16, 4))
    found = [
        float(loss(params, frozen, {"label": np.array([0, 1, 1]), **batch}, jax.random.key(2), 0)[0])
        for batch in ({"image": image}, {"moments": kept}, {"moments": kept * 1.1})
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    assert found[2] != pytest.approx(found[0], rel=1e-3)


def test_numbers_that_float16_cannot_hold_are_refused(place, tmp_path):
    folder = tokenizer_folder(tmp_path / "vae", place / "images", module=VAE)
    params = models.open_model(folder, "tokenizer").params()
    params["quant"]["bias"] = np.full_like(params["quant"]["bias"], 1e6)
    shutil.rmtree(folder / "params")
    save_params(folder / "params", params)
    with pytest.raises(SystemExit, match="not finite as float16"):
        tokenize.main([str(folder), "--out", str(tmp_path / "out")])
    assert not list((tmp_path / "out").glob("*.npy"))
