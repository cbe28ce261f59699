"""JPEG bytes as tokens, the grammar that keeps files whole, and tokenizers on the host in training and sampling."""

import functools
import io
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from trees import random_params

import ar_jax
from ar_jax import sample
from ar_jax.data import Info
from ar_jax.decode.sampling import Sampling
from ar_jax.generators.causal import Causal
from ar_jax.generators.maskgit import MaskGIT
from ar_jax.heads.categorical import Categorical
from ar_jax.machine.sharding import make_mesh
from ar_jax.nets.conditioning import Start
from ar_jax.nets.transformer import Transformer
from ar_jax.nets.vit import ViT
from ar_jax.orders import raster
from ar_jax.tokenizers import jpeg
from ar_jax.tokenizers.host import encoded, on_host
from ar_jax.tokenizers.jpeg import ENDED, FIRST_BYTE, PADDING, JpegBytes
from ar_jax.tokenizers.kl_vae import KLVAE
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.tokens import Grammar, TokenSpec, grid
from ar_jax.train import __main__ as train

TINY = JpegBytes((32, 48), length=200)


def smooth(count, size, seed=0):
    random = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(x).resize(size[::-1])) for x in random])


def model(**head):
    net = Transformer(1, 16, 2, hidden=24, line=True)
    return Causal(net, Start(16), Categorical(**head)).complete(TINY.spec, Info())


def test_twenty_of_twenty_samples_of_an_untrained_model_are_files_that_open():
    generator, order = model(bias=True), raster(TINY.spec)
    keys = jax.random.split(jax.random.key(0), 20)
    for scale in (0.1, 1.0):  # nearly even odds, and some bytes far likelier than others
        params = random_params(generator, scale)
        params["head"]["readout"]["bias"] *= 3
        tokens, _ = jax.jit(lambda params: Sampling().tokens(generator, params, {}, order, keys=keys))(params)
        tokens = np.asarray(tokens)
        assert len(np.unique(tokens, axis=0)) == 20
        images = TINY.host_decode(tokens)
        for row, image in zip(tokens[..., 0], images):
            (end,) = np.flatnonzero(row == ENDED)
            assert (row[end + 1 :] == PADDING).all()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found = Image.open(io.BytesIO(TINY.file(row)))
                np.testing.assert_array_equal(np.asarray(found.convert("RGB")), image)
            assert len(jpeg.restart_markers(TINY.file(row))) == 5


def test_files_of_images_follow_the_grammar_and_come_back_as_pillow_decodes_them():
    images, rules = smooth(9, TINY.size), TINY.spec.grammar
    tokens, state = TINY.host_encode(images)[..., 0], np.zeros(9, int)
    for i, code in enumerate(tokens.T):
        state = rules.after[state, rules.kind[code]]
        assert (state >= 0).all()
        assert (rules.left[state] < TINY.length - i).all()
    assert (state == len(rules.after) - 1).all()
    for image, found in zip(images, TINY.host_decode(tokens[..., None])):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=25, subsampling="4:2:0")
        np.testing.assert_array_equal(found, np.asarray(Image.open(file)))
    call = functools.partial(TINY.apply, {})
    inside = jax.jit(lambda image: call(call(image, method="encode"), method="decode"))
    np.testing.assert_array_equal(inside(images / 127.5 - 1.0), call(tokens[..., None], method="decode"))
    each = jax.jit(jax.vmap(lambda image: call(image[None], method="encode")[0]))  # as `ar_jax.evaluate` asks for them
    np.testing.assert_array_equal(each(images / 127.5 - 1.0)[..., 0], tokens)


def test_there_is_always_room_for_what_the_grammar_still_demands():
    rules = jpeg.grammar(40)
    assert (rules.left[0], rules.padding) == (2 * 40 + 1, PADDING)
    state, codes, legal_in, follow = jnp.zeros(1, jnp.int32), [], jax.jit(rules.legal), jax.jit(rules.follow)
    for room in range(100, 0, -1):
        legal = np.asarray(legal_in(state, room))[0]
        assert legal.any()
        codes.append(int(np.flatnonzero(legal)[0]))  # byte 0, wherever one may stand
        state = follow(state, jnp.array(codes[-1:]))
    assert codes[-1] == ENDED
    pairs = itertools.pairwise(np.array(codes) - FIRST_BYTE)
    marks = [byte - 0xD0 for before, byte in pairs if before == 0xFF and byte]
    assert marks == [i % 8 for i in range(39)] + [9]


def test_padding_does_not_count_in_training():
    generator, tokens = model(), TINY.host_encode(smooth(2, TINY.size))
    _, weight, _ = generator.apply(
        {"params": random_params(generator, 0.3)}, tokens, {}, raster(TINY.spec), drop=np.zeros(2, bool), method="loss"
    )
    np.testing.assert_array_equal(weight, tokens[..., 0] != PADDING)


def test_a_cut_file_keeps_its_parts_and_an_edit_keeps_those_before_the_first_free_pixel():
    images = smooth(3, TINY.size)
    tokens = TINY.host_encode(images)
    whole, free = TINY.host_decode(tokens), np.zeros((3, *TINY.size), bool)
    free[0, 16:], free[1, 20, 40], free[2] = True, True, True
    known = np.asarray(TINY.known(jnp.asarray(tokens), jnp.asarray(free)))
    cut = TINY.host_decode(np.where(known, tokens[..., 0], PADDING)[..., None])
    np.testing.assert_array_equal(cut[0, :15], whole[0, :15])  # colours of the last row are blended with those below
    assert not known[2].any()
    np.testing.assert_array_equal(cut[1, :15], whole[1, :15])
    assert known[1].sum() > known[0].sum() > 0
    stream = jpeg.stream(smooth(1, (64, 64))[0])
    first = jpeg.prefix(stream, 1)
    assert first.endswith(b"\xff\xd7")
    assert (jpeg.prefix(stream, 0), jpeg.prefix(stream, 9)) == (b"", stream)


def test_training_sampling_and_loading_take_a_tokenizer_of_the_host(tmp_path, monkeypatch):
    for command in (train, sample):
        monkeypatch.setattr(command, "make_mesh", lambda shape: make_mesh(shape, jax.devices()[:1]))
    small = {"layers": 1, "width": 16, "heads": 2, "hidden": 24}
    sizes = [word for name, value in small.items() for word in (f"--generator.module.backbone.{name}", str(value))]
    steps = {
        "steps": 3,
        "batch": 8,
        "optim.warmup": 1,
        "log-every": 3,
        "preview-every": 3,
        "preview-images": 8,
        "save-every": 3,
    }
    arguments = [word for name, value in steps.items() for word in (f"--generator.{name}", str(value))]
    config = ["configs/jpeg_lm.py:mnist5k", "--out", str(tmp_path), "--generator.module.conditioning.width", "16"]
    train.main([*config, *sizes, *arguments])
    run = str(tmp_path / "mnist5k_jpeg_lm")
    sample.main([run, "--count", "8", "--batch", "8", "--out", str(tmp_path / "a.npz")])
    drawn, loaded = np.load(tmp_path / "a.npz")["arr_0"], ar_jax.load(run)
    assert np.unique(drawn, axis=0).shape == (8, 32, 32, 3)
    images = smooth(2, (32, 32))
    tokens = loaded.encode(images)
    np.testing.assert_array_equal(loaded.decode(tokens), loaded.tokenizer.host_decode(tokens))
    assert np.isfinite(loaded.loss(images, [0, 1]))
    half = np.zeros((32, 32), np.uint8)
    half[16:] = 255
    Image.fromarray(images[0]).save(tmp_path / "photo.png")
    Image.fromarray(half).save(tmp_path / "mask.png")
    edit = ["--edit", str(tmp_path / "photo.png"), "--mask", str(tmp_path / "mask.png"), "--no-paste"]
    sample.main([run, "--count", "8", "--batch", "8", "--out", str(tmp_path / "b.npz"), *edit])
    completed = np.load(tmp_path / "b.npz")["arr_0"]
    np.testing.assert_array_equal(completed[:, :15], np.repeat(loaded.decode(tokens)[:1, :15], 8, axis=0))
    assert len(np.unique(completed, axis=0)) == 8
    with pytest.raises(ValueError, match=r"^tokens of JpegBytes stand for no vectors|^soft draws mixtures of codes"):
        loaded.sample(soft=True)
    with pytest.raises(SystemExit) as said:
        train.main([*config, *sizes, *arguments, "--name", "short", "--tokenizer.module.length", "20"])
    assert "tokenizer.length is 20, but a JPEG file of quality 10 has" in str(said.value.code)


def test_bad_input_is_refused_in_a_sentence():
    image = smooth(1, TINY.size)
    with pytest.raises(
        ValueError, match=r"^tokenizer\.length is 60, but a JPEG file of quality 25 has \d+ tokens; give more"
    ):
        TINY.clone(length=60).host_encode(image)
    assert TINY.clone(length=60, longer="cut").host_encode(image).shape == (1, 60, 1)
    with pytest.raises(ValueError, match=r"^tokenizer\.length is 12; with its markers the shortest file has 13 tokens"):
        _ = TINY.clone(length=12).spec
    assert [on_host(module) for module in (TINY, KLVAE(), VQGAN())] == [True, False, False]
    with pytest.raises(ValueError, match=r"^images have 16x16 pixels, but the tokenizer takes \(32, 48\)"):
        encoded(TINY)({"image": np.zeros((1, 16, 16, 3), np.uint8)})
    nonsense = FIRST_BYTE + np.array([0xFF, 0xD8, 0xFF, 0xD8] * 50)
    with pytest.raises(ValueError, match=r"^tokens are no JPEG file \(.*\); draw them with the tokenizer's grammar"):
        TINY.host_decode(nonsense[None, :, None])
    with pytest.raises(ValueError, match=r"^MaskGIT cannot draw tokens that have a grammar"):
        MaskGIT(ViT(1, 16, 2), Start(16), Categorical()).complete(TINY.spec, Info())
    kind, after = np.arange(2), np.array([[1, 1], [-1, 1]])
    for wrong in ((kind * 1.0, after), (kind + 1, after), (kind, after + 1), (kind, after[0])):
        with pytest.raises(ValueError, match=r"^grammar\.kind is \w+ \[2\] and grammar\.after int64 .*; they must be"):
            Grammar(*wrong)
    with pytest.raises(ValueError, match=r"^grammar\.after must end with a state in which one code is legal, padding"):
        Grammar(kind, after[::-1])
    with pytest.raises(ValueError, match=r"^codes is \(4,\), but the grammar speaks of 2 codes"):
        TokenSpec(grid(1, 4), codes=(4,), grammar=Grammar(kind, after))
    with pytest.raises(ValueError, match=r"^grammar\.after has 1 states from which no image can end"):
        _ = Grammar(kind, np.array([[0, 0], [-1, 1]])).left
