"""Released files as strangers make them: whatever is wrong with one is a sentence that names the file and what is wrong."""

import functools
import itertools
import os
import struct

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_reader import legacy, pickled, save, tensor

from ar_jax.convert.__main__ import main
from ar_jax.convert.names import to_weights
from ar_jax.convert.sources import export, identify
from ar_jax.data import Info
from ar_jax.files import words
from ar_jax.files.weights import CONTENTS, read_pickled_arrays, read_weights
from ar_jax.generators.block_flow import BlockFlow
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import NextLatent, NextScale
from ar_jax.generators.masked import Masked
from ar_jax.generators.rar import Aimed, Placed, StartLabel
from ar_jax.heads.categorical import Categorical
from ar_jax.heads.diffusion import Diffusion
from ar_jax.heads.joint_flow import JointFlow
from ar_jax.nets.adaln import AdaLN
from ar_jax.nets.conditioning import Label
from ar_jax.nets.gated import EncoderDecoder
from ar_jax.nets.transformer import Transformer
from ar_jax.nets.vit import ViT
from ar_jax.tokenizers.kl_vae import KLVAE
from ar_jax.tokenizers.maskgit_vqgan import MaskgitVQGAN
from ar_jax.tokenizers.residual_pyramid import ResidualPyramid
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.tokens import TokenSpec, grid, pyramid

INFO = Info(classes=3)
NET = {"size": (8, 8), "features": 4, "mult": (1, 2), "res_blocks": 1, "groups": 2}
CODES = {"codes": 12, "code_features": 4}
HEAD = Categorical(bias=True, std=0.02)


def generator(module, scales=(), rows=4, **spec):
    return module.complete(TokenSpec(pyramid(scales) if scales else grid(rows, rows), **spec), INFO)


MODULES = {
    "llamagen_vq": (VQGAN(latent=4, **NET, **CODES), {"size": 8, "groups": 2}),
    "var_vq": (ResidualPyramid(scales=(1, 2, 4), **NET, **CODES), {"size": 8, "groups": 2, "scales": (1, 2, 4)}),
    "kl16": (KLVAE(latent=4, **NET), {"size": 8, "groups": 2}),
    "rar_vq": (MaskgitVQGAN(**NET, **CODES), {"size": 8, "groups": 2}),
    "llamagen": (
        generator(Causal(Transformer(2, 16, 2, hidden=24), Label(16)), codes=(12,)),
        {"size": 64, "heads": 2},
    ),
    "var": (
        generator(Causal(AdaLN(2, 16, 2), Label(16), HEAD, NextScale(4)), (1, 2, 4), codes=(12,)),
        {"scales": (1, 2, 4)},
    ),
    "mar": (
        generator(Masked(ViT(2, 16, 2), ViT(2, 16, 2), Label(16, apart=True), Diffusion(16, 2), 2), channels=4),
        {"heads": 2},
    ),
    "flowar": (
        generator(
            Causal(
                EncoderDecoder(2, 16, 2, 2, 2, span=16, last_positions=True), Label(16),
                JointFlow(16, 2, heads=2, cross=False), NextLatent(4),
            ),
            (1, 2, 4), channels=4,
        ),
        {"scales": (1, 2, 4), "heads": 2},
    ),
    "xar": (generator(BlockFlow(EncoderDecoder(2, 16, 2, 2, 2), Label(16)), channels=4), {"heads": 2}),
    "rar": (
        generator(Causal(Placed(2, 16, 2, hidden=24), StartLabel(16), HEAD, Aimed(rows=1038)), codes=(12,)),
        {"heads": 2},
    ),
}  # fmt: skip


@functools.cache
def shapes_of(name):
    module = MODULES[name][0]
    found = export(module, "generator" if hasattr(module, "conditioning") else "tokenizer")
    return {**found.keys, **found.buffers}, found


class Looked(dict):
    """Shapes that remember which of them a family builds its network from."""

    def __getitem__(self, key):
        looked.add(key)
        return super().__getitem__(key)


looked = set()


@pytest.mark.parametrize("name", MODULES)
def test_entries_of_odd_ranks_and_numbers_are_named(name):
    (shapes, found), options = shapes_of(name), MODULES[name][1]
    looked.clear()
    found.source.build(found.kind, Looked(shapes), **{"size": 0, "heads": 0, "groups": 0, "scales": ()} | options)
    assert looked <= shapes.keys()
    for key in looked:
        for odd in ((), (0, *shapes[key][1:]), (1, *shapes[key])):
            with pytest.raises(ValueError, match=r"^looks like a|^not a checkpoint") as caught:
                identify(shapes | {key: odd}, **options)
            assert "\n" not in str(caught.value)
            assert key in str(caught.value) or len(odd) > len(shapes[key]), caught.value
    key = next(key for key in shapes if ".0." in key and ".1." not in key)
    for number in ("1000000000", "9" * 30, "9" * 5000):
        with pytest.raises(
            ValueError, match=r"^looks like a .* (is numbered beyond the|Exceeds the limit|is not part of)"
        ):
            identify(shapes | {key.replace(".0.", f".{number}.", 1): shapes[key]}, **options)


@pytest.mark.parametrize("key", ["x" * 10**6, "\x1b[2J\nsecond line\u202e"])
def test_texts_of_strangers_are_cut_and_shown(key, tmp_path):
    shapes, options = shapes_of("llamagen")[0], MODULES["llamagen"][1]
    for found in (shapes | {key: (3,)}, {key: (3,)}):
        with pytest.raises(ValueError, match=r"x{20}\.\.\.|x1b\[2J") as caught:
            identify(found, **options)
        assert len(str(caught.value)) < 600
        assert str(caught.value).isprintable()
    for tree in ({key: tensor(offset=9)}, {key: 3}, {"model": {key: 3}}, key, {(key,) * 99: 3}):
        with pytest.raises(ValueError, match=r"a\.pt") as caught:
            read_weights(save(tmp_path / "a.pt", tree, {"0": np.zeros(6, "f4")}))
        assert len(str(caught.value)) < 600 + len(str(tmp_path))
        assert str(caught.value).isprintable()


def test_what_is_shown_is_short():
    nested = ()
    for _ in range(50):
        nested = (nested,) * 9
    for value in (nested, 10**5000, "a" * 10**6, [["b" * 99] * 99] * 99, {"c": {"d": {"e": {"f": {}}}}}):
        assert len(words.shown(value)) <= 200
    assert words.name("layers.0.weight") == "layers.0.weight"
    assert words.reason(ValueError("a\nb")) == "a"
    assert words.reason(KeyError("a\x1b")) == r"KeyError: 'a\x1b'"


def test_a_command_names_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, found = shapes_of("llamagen")
    module = MODULES["llamagen"][0]
    weights = to_weights(jax.device_get(jax.jit(module.init_params)(jax.random.key(0))), found.rules)
    spoilt = {**weights, "layers.1.attention_norm.weight": np.full(16, np.nan, "f4")}
    wrong = {**weights, "norm.weight": np.array(1, "f4")}
    for what, said in (
        (spoilt, r"layers\.1\.attention_norm\.weight .* holds NaN"),
        (wrong, r"norm\.weight has shape \(\)"),
    ):
        save_file(what, "a.safetensors")
        with pytest.raises(SystemExit, match=rf"^python -m ar_jax\.convert: a\.safetensors: .*{said}"):
            main(["a.safetensors", "--to", "out", "--size", "64", "--heads", "2"])
        assert os.listdir() == ["a.safetensors"]


# Bounds ----------------------------------------------------------------------------------------------------

LARGE = {
    "a memo far away": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "bytes of 2^62": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".",
    "bytes of 2^36": b"\x80\x04\x8e" + struct.pack("<Q", 2**36) + b".",
    "text of 2^40": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b".",
    "a frame of 2^62": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b".",
    "a number of 2^31 bytes": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".",
    "a key nested deeply": b"\x80\x02})" + b"\x85" * 10**5 + b"Ns.",
    "a key of 2^60 parts": b"\x80\x02})" + b"2\x86" * 60 + b"Ns.",
    "a storage of 2^60 parts": b"\x80\x02)" + b"2\x86" * 60 + b"Q.",
    "calls that copy": b"\x80\x02(" + b"N" * 9999 + b"lq\x01(" + b"ctorch\nSize\nh\x01\x85R" * 999 + b"l.",
    "calls that encode": b"\x80\x02X" + struct.pack("<I", 9999) + b"a" * 9999 + b"q\x010("
    + b"c_codecs\nencode\nh\x01X\x06\x00\x00\x00latin1\x86R" * 999 + b"l.",
}  # fmt: skip


@pytest.mark.parametrize("program", LARGE.values(), ids=LARGE)
def test_pickles_take_memory_in_proportion_to_the_file(tmp_path, program):
    magic = pickled(0x1950A86A20F9469CFC6C) + pickled(1001) + pickled({"little_endian": True})
    zipped = save(tmp_path / "zip.pt", program).read_bytes()
    for content, read in itertools.product((zipped, magic + program, program), (read_weights, read_pickled_arrays)):
        (tmp_path / "a.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.pt") as caught:
            read(tmp_path / "a.pt")
        assert not isinstance(caught.value.__cause__, MemoryError)  # nothing was asked of the machine


def header(path, content, size, count=None):
    content = content.encode()
    path.write_bytes(struct.pack("<Q", len(content) if count is None else count) + content)
    os.truncate(path, path.stat().st_size + size)
    return path


@pytest.mark.parametrize(
    ("content", "size", "count", "message"),
    [
        ("{}", 0, 2**62, "its header has 4611686018427387904 bytes, of 4194304 at most and 10 in the file"),
        ("{}", 2**40, 2**32, "its header has 4294967296 bytes"),
        ("{" + " " * CONTENTS + "}", 0, None, "its header has 4194306 bytes"),
        ('{"x": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 0]}}', 0, None, "Error"),
        ('{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', 2**40, None, "Error"),
        ('{"x": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}, "x": {"dtype": "U8", "shape": [4], '
         '"data_offsets": [0, 4]}}', 4, None, "a name stands in its header twice"),
    ],
)  # fmt: skip
def test_headers_are_bounded(tmp_path, content, size, count, message):
    path = header(tmp_path / "a.safetensors", content, size, count)
    with pytest.raises(ValueError, match=rf"a\.safetensors is no readable safetensors file \(.*{message}"):
        read_weights(path)


def test_a_sparse_file_is_looked_at_not_read(tmp_path):
    content = '{"x": {"dtype": "F32", "shape": [68719476736], "data_offsets": [0, 274877906944]}}'
    with pytest.raises(SystemExit, match=r"a\.safetensors: not a checkpoint of a known family"):
        main([str(header(tmp_path / "a.safetensors", content, 2**38)), "--to", str(tmp_path / "out")])
    path = save(tmp_path / "a.pt", {"x": tensor()}, {"0": np.zeros(6, "f4")})
    os.truncate(path, 2**38)
    with pytest.raises(ValueError, match=r"a\.pt: .*(cut short|damaged)"):
        read_weights(path)


def test_tensors_do_not_stand_for_more_than_the_file(tmp_path):
    for shape in ((2**29,), (2**59,), (2**31, 2**20)):
        path = save(tmp_path / "a.pt", {"x": tensor(shape=shape, strides=(0,) * len(shape))}, {"0": np.zeros(6, "f4")})
        with pytest.raises(ValueError, match=r"a\.pt: with tensor x it stands for many times its own size"):
            read_weights(path)


def test_records_and_storages_are_each_their_own(tmp_path):
    storages = {"0": np.arange(6, dtype="f4"), "1": np.arange(6, 12, dtype="f4")}
    path = save(tmp_path / "a.pt", {"x": tensor(), "y": tensor("1")}, storages)
    content, index = bytearray(path.read_bytes()), []
    for _ in range(2):
        index.append(content.rindex(b"PK\x01\x02", 0, index[-1] if index else None))
    last, before = index
    moved = content[:]
    moved[last + 42 : last + 46] = content[before + 42 : before + 46]
    path.write_bytes(moved)
    with pytest.raises(ValueError, match=r"a\.pt: its record archive/data/1 is not where the index says"):
        read_weights(path)
    with pytest.raises(ValueError, match=r"a\.pt: its storage 1 belongs to no tensor"):
        read_weights(save(path, {"x": tensor(), "y": tensor()}, storages))
    with pytest.raises(ValueError, match=r"a\.pt: its storage 0 is named twice, with different contents"):
        read_weights(
            save(path, {"x": tensor(), "y": tensor(dtype="DoubleStorage", shape=(3,), strides=(1,))}, storages)
        )
    value, one = {"x": tensor()}, {"0": storages["0"]}
    whole = legacy(tmp_path / "b.pt", value, one).read_bytes()
    (tmp_path / "b.pt").write_bytes(whole.replace(pickled(["0"]), pickled(["0", "0"])) + whole[-32:])
    with pytest.raises(ValueError, match=r"b\.pt: its storage '0' is of no known type, or there twice"):
        read_weights(tmp_path / "b.pt")


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.ckpt"])
def test_what_is_no_file_is_not_read(tmp_path, name):
    path, read = tmp_path / name, read_pickled_arrays if name == "a.ckpt" else read_weights
    os.mkfifo(path)
    with pytest.raises(ValueError, match=rf"{name} is no regular file"):
        read(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=rf"{name} is no regular file"):
        read(path)
    path.unlink()
    path.symlink_to(path)
    with pytest.raises((OSError, ValueError), match=name):
        read(path)
