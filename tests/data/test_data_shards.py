"""Tars, Hugging Face data sets, Parquet files and functions of one's own."""

import dataclasses
import io
import itertools
import json
import os
import sys
import tarfile
from concurrent import futures
from pathlib import Path

import numpy as np
import pytest
from data.packing import add, pack, png
from PIL import Image

from ar_jax.data import Data, Info, NoSplit, Opened, Unreadable, batches, open_source
from ar_jax.data import webdataset as tars
from ar_jax.data.pack import pack as write_records
from ar_jax.data.pipeline import _Mixed
from ar_jax.files import trust
from ar_jax.machine import distributed

COUNT, NAMES = 30, ("a", "b", "c")
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 3), np.uint8)
LABELS = [i * 3 // COUNT for i in range(COUNT)]
PACKAGES = {"huggingface": "datasets", "parquet": "pyarrow"}
KINDS = ("webdataset", "huggingface", "parquet")


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("AR_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


def packed(place, kind, **settings):
    if kind in PACKAGES:
        pytest.importorskip("datasets", reason="needs the package datasets")
    return Data(name=kind, path=str(pack(place, kind, IMAGES, LABELS, NAMES, 3)), size=8, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_records_are_those_that_were_packed(tmp_path, kind):
    source = open_source(packed(tmp_path, kind))
    assert source.info == Info(classes=3, class_names=NAMES)
    assert len(source) == COUNT
    with futures.ThreadPoolExecutor(8) as pool:
        records = list(pool.map(source.__getitem__, range(COUNT)))
    for record, image, label in zip(records, IMAGES, LABELS, strict=True):
        np.testing.assert_array_equal(record["image"], image)
        assert record["label"] == label
    with pytest.raises(IndexError):
        source[COUNT]


@pytest.mark.parametrize("kind", ["image_folder", *KINDS])
def test_photos_are_turned_wherever_they_are_read(tmp_path, kind, monkeypatch):
    def photo(image):
        exif, content = Image.Exif(), io.BytesIO()
        exif[0x0112] = 6
        Image.fromarray(np.rot90(image)).save(content, "PNG", exif=exif)
        return content.getvalue()

    monkeypatch.setattr("data.packing.png", photo)
    data = packed(tmp_path, kind)
    np.testing.assert_array_equal(open_source(data)[0]["image"], IMAGES[0])
    np.testing.assert_array_equal(
        open_source(dataclasses.replace(data, upright=False))[0]["image"], np.rot90(IMAGES[0])
    )
    if kind == "image_folder":
        write_records(Path(data.path), tmp_path / "packed", shards=1)
        write_records(Path(data.path), tmp_path / "small", shards=1, size=8)
        for name in ("packed", "small"):
            kept = open_source(Data(name="array_record", path=str(tmp_path / name)))
            np.testing.assert_array_equal(kept[0]["image"], IMAGES[0])


@pytest.mark.parametrize("kind", KINDS)
def test_unreadable_images_are_named_by_file_and_key_and_decoded_as_everywhere(tmp_path, kind, monkeypatch):
    bad = {2: b"%!PS-Adobe-3.0 EPSF-3.0\n", 5: b"", 11: b"damaged"}
    monkeypatch.setattr("data.packing.png", lambda image: bad.pop(next(number), None) or png(image))
    number = itertools.count()
    data = packed(tmp_path, kind)
    source = open_source(data)
    expected = {
        "webdataset": r"cannot read sample '000002' of .*part-000\.tar \(cannot identify",
        "huggingface": r"cannot read record 2 of .*huggingface \(cannot identify",
        "parquet": r"cannot read row 2 of row group 0 of .*part-000\.parquet \(cannot identify",
    }
    with pytest.raises(Unreadable, match=expected[kind]):
        source[2]
    skipping = open_source(Data(**vars(data) | {"unreadable": "skip"}))
    np.testing.assert_array_equal(skipping[2]["image"], IMAGES[3])
    np.testing.assert_array_equal(skipping[11]["image"], IMAGES[12])


# tars


def written(path, *members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            add(tar, name, content)
    return path


def opened(place, **settings):
    return open_source(Data(name="webdataset", path=str(place), size=8, **settings))


FILES = [png(image) for image in IMAGES[:4]]


def test_samples_of_a_tar_are_its_files_with_one_key(tmp_path):
    caption = json.dumps({"caption": "from json", "url": "x"}).encode()
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        folder = tarfile.TarInfo("deep")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        add(tar, "deep/1.JPG", FILES[0])  # what is in a file decides, not its name
        add(tar, "deep/1.txt", "ein Käfer\n".encode())
        add(tar, "deep/1.json", b"not looked at")
        add(tar, "deep/._2.png", b"left by a Mac")
        add(tar, f"deep/{'2' * 200}.seg.png", FILES[3])  # another thing of the sample, which is no image of ours
        add(tar, f"deep/{'2' * 200}.png", FILES[1])
        add(tar, f"deep/{'2' * 200}.json", caption)
        link = tarfile.TarInfo("deep/3.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    source = opened(tmp_path)
    assert source.info == Info(captions=True)
    assert source.captions() == [source[i]["caption"] for i in range(len(source))] == ["ein Käfer", "from json"]
    for i in range(2):
        np.testing.assert_array_equal(source[i]["image"], IMAGES[i])


def test_a_tar_is_indexed_once_and_again_when_it_changes(tmp_path, monkeypatch):
    asked, index = [], tars._index
    monkeypatch.setattr(tars, "_index", lambda path: asked.append(path.name) or index(path))
    for name in ("a.tar", "b.tar"):
        written(tmp_path / "tars" / name, ("1.png", FILES[0]), ("1.cls", b"0"))
    assert len(opened(tmp_path / "tars")) == len(opened(tmp_path / "tars")) == 2
    assert asked == ["a.tar", "b.tar"]
    written(tmp_path / "tars" / "b.tar", ("1.png", FILES[0]), ("1.cls", b"4"), ("2.png", FILES[1]), ("2.cls", b"1"))
    source = opened(tmp_path / "tars")
    assert asked == ["a.tar", "b.tar", "b.tar"]
    assert (len(source), source.info.classes, source[2]["label"]) == (3, 3, 1)
    for path in tars.cache.place("tars").iterdir():
        assert path.suffix == ".npz"
        path.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"index of a tar that was kept, is damaged .*delete it"):
        opened(tmp_path / "tars")


def test_damaged_and_odd_tars_are_refused_in_a_sentence(tmp_path):
    def refused(match, *members, name="a.tar", change=lambda path: None):
        path = written(tmp_path / str(len(list(tmp_path.iterdir()))) / name, *members)
        change(path)
        with pytest.raises(ValueError, match=match):
            opened(path.parent)

    def cut(path):
        path.write_bytes(path.read_bytes()[:1800])

    def compressed(path):
        with tarfile.open(path, "w:gz") as tar:
            add(tar, "1.png", FILES[0])

    def bloated(path):  # a name of a gigabyte, in a file that takes no room on the disk
        header = tarfile.TarInfo("././@LongLink")
        header.type, header.size = tarfile.GNUTYPE_LONGNAME, 2**30
        path.write_bytes(header.tobuf(tarfile.GNU_FORMAT))
        os.truncate(path, 2**30 + 2048)

    refused(
        r"a\.tar is damaged after 1 samples", ("1.png", FILES[0]), ("2.png", bytes(3000)), ("3.png", b""), change=cut
    )
    refused("is damaged, or is compressed", change=compressed)
    refused("the tars hold no images", ("1.txt", b"words"))
    refused(r"sample '1' has b'cat' in \.cls", ("1.png", FILES[0]), ("1.cls", b"cat"))
    refused(r"1 of 2 samples have no label", ("1.png", FILES[0]), ("1.cls", b"0"), ("2.png", FILES[0]))
    refused(r"1 of 2 samples have no caption", ("1.png", FILES[0]), ("1.txt", b"x"), ("2.png", FILES[0]))
    refused("JSON cannot be read", ("1.png", FILES[0]), ("1.json", b"{"))
    refused("is damaged, or is compressed", change=bloated)
    refused(r"no files \*\.tar of the split train in", name="a.tgz")
    for content in (b"a\nb\n",):
        path = written(tmp_path / "named" / "a.tar", ("1.png", FILES[0]), ("1.cls", b"2"))
        (path.parent / "classnames.txt").write_bytes(content)
        with pytest.raises(ValueError, match="has 2 names, but there is a label 2"):
            opened(path.parent)


def test_a_sample_without_an_image_is_an_unreadable_one(tmp_path):
    written(tmp_path / "a.tar", ("1.png", FILES[0]), ("2.txt.gz", b"x"))
    with pytest.raises(Unreadable, match=r"sample '2' of .*a\.tar \(the sample has no image\)"):
        opened(tmp_path)[1]
    (tmp_path / "a.tar").unlink()
    source = opened(written(tmp_path / "b.tar", ("1.png", FILES[0])).parent)
    (tmp_path / "b.tar").write_bytes(b"")
    with pytest.raises(Unreadable, match="the file ends before"):
        source[0]


@pytest.mark.parametrize(
    ("names", "train", "test"),
    [
        (("train/0.tar", "train/1.tar", "validation/0.tar"), 2, 1),
        (("imagenet-train-0.tar", "imagenet-train-1.tar", "imagenet-validation-0.tar", "imagenet-test-0.tar"), 2, 1),
        (("0.tar", "1.tar", "latest.tar"), 3, None),
        (("train-0.tar", "more/test_0.tar", ".hidden/train.tar"), 1, 1),
        (("test-0.tar",), 1, None),
    ],
)
def test_splits_are_folders_or_words_in_names(tmp_path, names, train, test):
    for name in names:
        written(tmp_path / name, ("1.png", FILES[0]))
    assert len(opened(tmp_path)) == train
    if test is None:
        with pytest.raises(NoSplit, match=r"data\.split is test"):
            opened(tmp_path, split="test")
    else:
        assert len(opened(tmp_path, split="test")) == test
    assert len(opened(tmp_path, split="all")) == train + (test or 0)


def test_a_pattern_names_files(tmp_path):
    for i in range(8, 12):
        written(tmp_path / f"part-{i:02d}.tar", ("1.png", FILES[i - 8]))
    source = opened(tmp_path / "part-{09..11}.tar")
    np.testing.assert_array_equal(source[2]["image"], IMAGES[3])
    assert len(source) == 3
    with pytest.raises(FileNotFoundError, match=r"part-12\.tar cannot be read"):
        opened(tmp_path / "part-{09..12}.tar")
    with pytest.raises(NoSplit):
        opened(tmp_path / "part-{09..11}.tar", split="test")
    for pattern in ("{11..09}", "{0..9999999}", "{000..999}{000..999}{0..9}"):
        with pytest.raises(ValueError, match="must rise, and stand for no more than"):
            opened(tmp_path / f"part-{pattern}.tar")


# hosts


def shares(data, parts, batch=6):
    """Streams of as many processes, each with its part of the shards."""
    rows = np.arange(batch).reshape(parts, -1)
    sources = [Opened((i, parts))(data) for i in range(parts)]
    return [batches(source, data, batch=batch, seed=0, rows=mine) for source, mine in zip(sources, rows)]


def which(batch):
    return [int(np.flatnonzero((image == IMAGES).all((1, 2, 3)))[0]) for image in batch["image"]]


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_hosts_open_their_own_shards_only(tmp_path, kind, capsys):
    data = packed(tmp_path, kind, shards="split")
    pattern = tmp_path / kind / ("part-{000..002}" + (".tar" if kind == "webdataset" else ".parquet"))
    data = Data(**vars(data) | {"path": str(pattern)})
    streams, files = shares(data, 3), sorted((tmp_path / kind).glob("part-*"))
    seen = [list(itertools.chain(*(which(next(stream)) for _ in range(5)))) for stream in streams]
    assert [sorted(each) for each in seen] == [list(range(10)), list(range(10, 20)), list(range(20, 30))], "a pass each"
    assert seen[0] != [i - 10 for i in seen[1]], "in orders of their own"
    state = streams[1].get_state()
    assert state == {"global_next_index": 30, "parts": 3}
    rest = [which(next(streams[1])) for _ in range(3)]
    for file in (files[0], files[2]):
        file.unlink()  # the other hosts' disks have them
    again = batches(Opened((1, 3))(data), data, batch=6, seed=0, rows=np.array([2, 3]))
    again.set_state(state)
    assert [which(next(again)) for _ in range(3)] == rest
    assert not capsys.readouterr().out
    batches(Opened((1, 3))(data), data, batch=6, seed=0, rows=np.arange(6)).set_state(state)
    assert "dealt out in 3 parts before and in 1 now" in capsys.readouterr().out


def test_of_one_host_all_shards_are_its_own_in_the_same_order(tmp_path):
    data = packed(tmp_path, "webdataset")
    (own,) = shares(Data(**vars(data) | {"shards": "split"}), 1)
    usual = batches(open_source(data), data, batch=6, seed=0, rows=np.arange(6))
    assert [which(next(own)) for _ in range(7)] == [which(next(usual)) for _ in range(7)]


def test_what_every_process_reads_is_what_the_first_one_has(tmp_path, monkeypatch):
    data, said = packed(tmp_path, "webdataset", shards="split"), []
    monkeypatch.setattr(distributed, "agreed", lambda batch: said.append(batch) or batch)
    source = Opened((1, 3))(data)
    for train in (False, True):  # pictures and evaluations; measurements of latents
        batch = next(batches(source, data, batch=4, seed=0, train=train))
        assert batch is said[-1]
        assert set(which(batch)) <= set(range(10, 20))
    assert len(said) == 2


def test_shards_that_cannot_be_dealt_out_are_refused(tmp_path, monkeypatch):
    data = packed(tmp_path, "webdataset", shards="split")
    with pytest.raises(ValueError, match=r"there are 3 files \*\.tar for 4 parts"):
        Opened((0, 4))(data)
    with pytest.raises(ValueError, match=r"data\.name=mnist5k has no shards to deal out"):
        open_source(Data(shards="split"))
    monkeypatch.setattr(distributed, "gathered", lambda number: np.array([number, number + 1]))
    with pytest.raises(ValueError, match="hosts see different files"):
        Opened((0, 2))(data)


# runs of records


@pytest.mark.parametrize("mixed", [1, 7, 20, 1000])
def test_runs_are_shuffled_and_a_pass_has_every_record_once(mixed):
    runs = np.array([5, 1, 9, 2, 8, 6, 3])
    order = _Mixed(runs, mixed, seed=3)
    passes = [[order[34 * i + j] for j in range(34)] for i in range(3)]
    assert all(sorted(each) == list(range(34)) for each in passes)
    assert passes[0] != passes[1] != passes[2] != list(range(34))
    assert [_Mixed(runs, mixed, seed=3)[i] for i in (100, 3, 40)] == [passes[2][32], passes[0][3], passes[1][6]]
    of = np.repeat(np.arange(7), runs)[passes[0]]
    if mixed == 1:
        assert (np.diff(of) != 0).sum() == 6, "a run at a time"
    if mixed == 7:  # runs mix with their neighbours only
        spans = [np.ptp(np.flatnonzero(of == run)) for run in range(7)]
        assert max(spans) < 7 + 9


def test_a_row_group_is_read_once_while_it_is_needed(tmp_path, monkeypatch):
    data = packed(tmp_path, "parquet", mixed=8)
    source, reads = open_source(data), []
    read = source._read
    monkeypatch.setattr(source, "_read", lambda group, names: reads.append(group) or read(group, names))
    stream = batches(source, data, batch=6, seed=0)
    for _ in range(15):  # three passes
        next(stream)
    assert len(source.groups) == 3
    assert len(reads) <= 3 * 5


# Hugging Face and Parquet


def test_columns_are_found_by_kind_and_name(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs the package pyarrow")
    from pyarrow import parquet

    def source(image, **columns):
        table = pa.table({"image": image, **columns})
        parquet.write_table(table, tmp_path / "a.parquet")
        return open_source(Data(name="parquet", path=str(tmp_path), size=8))

    plain = source(FILES, label=[0, 6, 2, 1], text=["a", "b", None, "d"])
    assert plain.info == Info(classes=4, class_names=("0", "1", "2", "6"), captions=True)
    assert plain.captions() == [plain[i]["caption"] for i in range(4)] == ["a", "b", "", "d"]
    structs = source(
        [{"bytes": FILES[0], "path": None}, {"bytes": None, "path": "/etc/passwd"}], caption=[["x", "y"], []]
    )
    assert structs.info == Info(captions=True)
    assert structs.captions() == ["x", ""]
    with pytest.raises(Unreadable, match=r"row 1 of row group 0 of .*a\.parquet \(it has no bytes, only a path"):
        structs[1]
    with pytest.raises(ValueError, match="has the columns image, label, and no image"):
        source(["a", "b"], label=[0, 1])
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read as Parquet"):
        open_source(Data(name="parquet", path=str(tmp_path)))


def test_splits_of_a_dataset_dict(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")

    def rows(labels):
        features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int32")})
        values = {"img": [{"bytes": FILES[0], "path": None}] * len(labels), "label": labels}
        return datasets.Dataset.from_dict(values, features=features)

    parts = {"train": rows([0, 1]), "validation": rows([4]), "test": rows([9, 9])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "dict")
    data = Data(name="huggingface", path=str(tmp_path / "dict"))
    found = {split: open_source(Data(**vars(data) | {"split": split})) for split in ("train", "test", "all")}
    assert {split: len(source) for split, source in found.items()} == {"train": 2, "test": 1, "all": 3}
    assert {source.info.classes for source in found.values()} == {3}
    rows([0]).save_to_disk(tmp_path / "one")
    with pytest.raises(NoSplit, match="is a single Dataset"):
        open_source(Data(name="huggingface", path=str(tmp_path / "one"), split="test"))
    with pytest.raises(FileNotFoundError, match="neither dataset_dict"):
        open_source(Data(name="huggingface", path=str(tmp_path)))


@pytest.mark.parametrize("kind", ["huggingface", "parquet"])
def test_without_the_package_the_extra_is_named(tmp_path, kind, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGES[kind], None)
    with pytest.raises(ValueError, match=rf"pip install ar_jax\[{kind}\]"):
        open_source(Data(name=kind, path=str(tmp_path)))


# functions of one's own

OWN = """
import numpy as np
from ar_jax.data import Data, Info, Source

class Grey:
    info = Info(classes=2)
    def __len__(self): return 4
    def __getitem__(self, index): return {"image": np.full((8, 8, 3), index, np.uint8), "label": index % 2}

def grey(data: Data) -> Source:
    return Grey()

def shards(data: Data, part: tuple[int, int]) -> Source:
    return Grey()

def other(data): raise SystemExit("called")
"""


def test_a_function_of_ones_own_is_opened_where_it_is_trusted(tmp_path, monkeypatch):
    (tmp_path / "my_own_data.py").write_text(OWN)
    monkeypatch.setattr(trust, "_trusted", set())
    monkeypatch.setattr(sys, "path", list(sys.path))
    data = Data(name="my_own_data:grey", size=8)
    with pytest.raises(
        trust.Untrusted, match=r"data\.name\.function: 'my_own_data:grey' lies outside ar_jax.* give --trust"
    ):
        open_source(data)
    assert "my_own_data" not in sys.modules
    trust.trust(str(tmp_path / "my_own_data.py"))
    assert next(batches(open_source(data), data, batch=4, seed=0))["image"].shape == (4, 8, 8, 3)
    assert len(open_source(Data(name="my_own_data:shards", shards="split"))) == 4
    for name, match in (("other", "it must be"), ("Grey", "no function"), ("none", "does not exist")):
        with pytest.raises(ValueError, match=match):
            open_source(Data(name=f"my_own_data:{name}"))
    sys.modules.pop("my_own_data")


def test_what_a_file_names_is_not_run():
    for name in ("os:system", "ar_jax.train.checkpoint:_set_aside", "builtins:exec"):
        with pytest.raises(ValueError, match=r"data\.name\.function: "):
            open_source(Data(name=name))
    with pytest.raises(ValueError, match="or my_module:function"):
        open_source(Data(name="my_function"))
