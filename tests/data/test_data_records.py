import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ar_jax.data import Data, arrays, batches, open_records, open_source, write_shards
from ar_jax.data.pack import pack


def _records(count):
    return [{"tokens": np.full((2, 3, 1), i, np.int32), "label": i % 2, "caption": f"nr {i}"} for i in range(count)]


def _values(folder):
    records = open_records(folder)
    return [int(records[i]["tokens"][0, 0, 0]) for i in range(len(records))]


def test_records_come_back_in_order_and_type(tmp_path):
    assert write_shards(tmp_path, _records(7), {"classes": 2, "note": "x"}, 3)
    records = open_records(tmp_path)
    assert (len(records), records.info["note"], records.info["count"]) == (7, "x", 7)
    assert _values(tmp_path) == list(range(7))
    assert records[5]["caption"] == "nr 5"
    assert records[5]["tokens"].dtype == np.int32
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "info.json",
        *(f"shard-0000{i}-of-00003.array_record" for i in range(3)),
    ]
    with pytest.raises(IndexError):
        records[7]


class _Interrupted(list):
    """Fails at one record, and notes which slices were asked for."""

    def __init__(self, records, at):
        super().__init__(records)
        self.at, self.asked = at, []

    def __getitem__(self, rows):
        self.asked.append(rows.start)
        for i, record in zip(range(rows.start, rows.stop), super().__getitem__(rows), strict=True):
            if i == self.at:
                raise KeyboardInterrupt
            yield record


def test_an_interrupted_write_is_never_read_and_goes_on_where_it_stopped(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, _Interrupted(_records(6), at=3), {}, 3)
    with pytest.raises(FileNotFoundError, match="interrupted: run the same command again"):
        open_records(tmp_path)
    again = _Interrupted(_records(6), at=None)
    assert write_shards(tmp_path, again, {}, 3)
    assert again.asked == [2, 4]  # shard 0, records 0 and 1, was whole
    assert _values(tmp_path) == list(range(6))
    done = _Interrupted(_records(6), at=0)
    assert write_shards(tmp_path, done, {}, 3)
    assert not done.asked


def test_other_records_are_not_mixed_in(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, _Interrupted(_records(6), at=3), {"size": 1}, 3)
    with pytest.raises(ValueError, match="unfinished attempt with other settings"):
        write_shards(tmp_path, _records(6), {"size": 2}, 3)
    write_shards(tmp_path, _records(6), {"size": 1}, 3)
    with pytest.raises(ValueError, match="already holds other records"):
        write_shards(tmp_path, _records(6), {"size": 2}, 3)


def test_processes_may_share_the_shards(tmp_path):
    assert not write_shards(tmp_path, _records(5), {}, 2, only=[1])
    with pytest.raises(FileNotFoundError):
        open_records(tmp_path)
    assert write_shards(tmp_path, _records(5), {}, 2, only=[0])
    assert _values(tmp_path) == list(range(5))


def test_lost_or_foreign_shards_are_noticed(tmp_path):
    write_shards(tmp_path / "a", _records(4), {}, 2)
    write_shards(tmp_path / "b", _records(6), {}, 2)
    shard = "shard-00001-of-00002.array_record"
    (tmp_path / "b" / shard).replace(tmp_path / "a" / shard)
    with pytest.raises(ValueError, match=r"holds 5 records, its info\.json says 4"):
        open_records(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="is missing"):
        open_records(tmp_path / "b")
    with pytest.raises(ValueError, match="no records"):
        write_shards(tmp_path / "c", [], {}, 2)


def _folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(5):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 9, 3), np.uint8)).save(path)
    return tmp_path / "images"


def _same(one, other):
    assert len(one) == len(other)
    assert one.info == other.info
    for i in range(len(one)):
        np.testing.assert_array_equal(np.asarray(one[i].pop("image")), np.asarray(other[i].pop("image")))
        assert {k: v for k, v in one[i].items() if k != "image"} == {k: v for k, v in other[i].items() if k != "image"}


def test_packed_images_equal_the_folder(tmp_path):
    folder = _folder(tmp_path)
    pack(folder, tmp_path / "packed", shards=2)
    data = Data(name="array_record", path=str(tmp_path / "packed"))
    _same(open_source(data), open_source(Data(name="image_folder", path=str(folder))))
    pack(folder, tmp_path / "small", size=6)
    small = open_source(Data(name="array_record", path=str(tmp_path / "small")))
    assert small[0]["image"].size == (6, 6)


def test_captions_and_splits_survive_packing(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "images" / split).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / split / "a.png")
        line = json.dumps({"file": "a.png", "caption": split, "label": "x"})
        (tmp_path / "images" / split / "captions.jsonl").write_text(line)
    pack(tmp_path / "images", tmp_path / "packed")
    for split, captions in (("train", ["train"]), ("test", ["val"]), ("all", ["train", "val"])):
        data = Data(name="array_record", path=str(tmp_path / "packed"), split=split)
        assert open_source(data).captions() == captions
        folder = Data(name="image_folder", path=str(tmp_path / "images"), split=split)
        _same(open_source(data), open_source(folder))


def test_packing_finds_damaged_files_first(tmp_path, capsys):
    folder = _folder(tmp_path)
    (folder / "a" / "2.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"2\.png"):
        pack(folder, tmp_path / "packed")
    with pytest.raises(FileNotFoundError, match="interrupted"):
        open_source(Data(name="array_record", path=str(tmp_path / "packed")))
    pack(folder, tmp_path / "packed", unreadable="skip")  # the shard of this file alone ends up empty
    assert len(open_source(Data(name="array_record", path=str(tmp_path / "packed")))) == 4
    assert "left out 1" in capsys.readouterr().out


def test_a_changed_folder_is_not_mixed_with_old_shards(tmp_path):
    folder = _folder(tmp_path)
    pack(folder, tmp_path / "packed")
    (folder / "a" / "0.png").unlink()
    with pytest.raises(ValueError, match="already holds other records"):
        pack(folder, tmp_path / "packed")


def test_token_caches_give_every_version_its_turn(tmp_path):
    records = [{"tokens": np.arange(2 * 6).reshape(2, 3, 2) + 100 * i, "label": i} for i in range(2)]
    write_shards(tmp_path, records, {"classes": 2}, 1)
    data = Data(name="tokens", path=str(tmp_path))
    source, seen = open_source(data), set()
    stream = batches(source, data, batch=2, seed=0)
    for _ in range(20):
        batch = next(stream)
        assert batch["tokens"].shape == (2, 3, 2)
        assert batch["tokens"].dtype == np.int32
        assert (batch["tokens"][:, 0, 0] // 100).tolist() == batch["label"].tolist()
        seen |= set(batch["tokens"][:, 0, 0].tolist())
    assert seen == {0, 6, 100, 106}
    plain = next(batches(source, data, batch=2, seed=0, train=False))
    assert plain["tokens"][:, 0, 0].tolist() == [0, 100]


def test_continuous_tokens_are_float32(tmp_path):
    write_shards(tmp_path, [{"tokens": np.ones((1, 4, 2), np.float16)}], {}, 1)
    data = Data(name="tokens", path=str(tmp_path))
    assert next(batches(open_source(data), data, batch=1, seed=0))["tokens"].dtype == np.float32


def test_tokens_and_images_are_told_apart(tmp_path):
    write_shards(tmp_path, _records(2), {"classes": 2}, 1)
    with pytest.raises(ValueError, match=r"no image; is data\.name=tokens meant"):
        open_source(Data(name="array_record", path=str(tmp_path)))


def _cached(count, offset=0):
    """Records as `ar_jax.tokenize` writes them, with captions of other lengths and features of other rows."""
    rng, text = np.random.default_rng(0), np.random.default_rng(1).integers(256, size=(count, 4, 5)).astype(np.float32)
    for i in range(count):
        tokens = rng.integers(0, 300, (3, 6, 2)).astype(np.uint16)
        mask = np.arange(4) >= 4 - i % 5
        record = {"tokens": tokens + offset, "label": i % 4, "caption": "é" * (i % 3)}
        yield record | {"text": text[i] * mask[:, None], "text_mask": mask}


CACHED = {"classes": 4, "captions": True, "text": "test", "text_rows": 4, "text_width": 5}


def _both(folder, count, **changes):
    """The same records as ArrayRecord files, as earlier versions wrote them, and as arrays."""
    write_shards(folder / "old", list(_cached(count)), CACHED, 3)
    write_shards(folder / "new", list(_cached(count)), CACHED | {"form": arrays.NAME}, 3, form=arrays.FORM)
    return [Data(name="tokens", path=str(folder / name), **changes) for name in ("old", "new")]


def test_features_that_were_cached_in_float32_are_read(tmp_path):
    new, shard = _both(tmp_path, 3)[1], tmp_path / "new"
    want = [record["text"] for record in open_records(shard)]
    for path in shard.glob("*.text.npy"):
        np.save(path, np.load(path).view(jnp.bfloat16).astype(np.float32))
    for record, text in zip(open_source(new), want, strict=True):
        assert record["text"].dtype == np.float32
        np.testing.assert_array_equal(record["text"], text)


@pytest.mark.parametrize("train", [True, False])
def test_arrays_give_the_batches_of_the_records_of_earlier_versions(tmp_path, train):
    old, new = _both(tmp_path, 11)
    sources = [open_source(data) for data in (old, new)]
    assert not hasattr(sources[0], "gather")
    assert hasattr(sources[1], "gather"), "read a batch at a time"
    for i in range(11):
        for name, value in sources[0][i].items():
            np.testing.assert_array_equal(sources[1][i][name], value)
            assert np.asarray(sources[1][i][name]).dtype == (jnp.bfloat16 if name == "text" else np.asarray(value).dtype)
    assert sources[1].captions() == sources[0].captions()
    one, other = (batches(source, old, batch=4, seed=3, train=train) for source in sources)
    for _ in range(3 if not train else 9):
        a, b = next(one), next(other)
        assert a.keys() == b.keys() == {"tokens", "label", "text", "text_mask"}
        for name in a:
            assert a[name].dtype == b[name].dtype or name == "text"
            np.testing.assert_array_equal(a[name], b[name])
    if train:  # resumed, on one of two processes
        again = batches(sources[1], new, batch=4, seed=3, rows=np.array([1, 3]))
        again.set_state({"global_next_index": 4 * 9})
        np.testing.assert_array_equal(next(again)["tokens"], next(one)["tokens"][[1, 3]])


def test_splits_of_arrays_are_gathered_together(tmp_path):
    for split, count, offset in (("train", 5, 0), ("val", 3, 1000)):
        info = CACHED | {"form": arrays.NAME}
        write_shards(tmp_path / split, list(_cached(count, offset)), info, 2, form=arrays.FORM)
    data = Data(name="tokens", path=str(tmp_path), split="all")
    source = open_source(data)
    batch = source.gather(np.array([6, 0, 7, 4]), np.array([0, 1, 2, 0]))
    assert (batch["tokens"][:, 0, 0] >= 1000).tolist() == [True, False, True, False]
    for place, (i, version) in enumerate(((6, 0), (0, 1), (7, 2), (4, 0))):
        np.testing.assert_array_equal(batch["tokens"][place], source[i]["tokens"][version])
        np.testing.assert_array_equal(batch["text"][place], source[i]["text"])


def test_a_shard_of_arrays_is_whole_or_not_there(tmp_path):
    info = {"form": arrays.NAME}
    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, _Interrupted(_records(6), at=3), info, 3, form=arrays.FORM)
    assert not [path.name for path in tmp_path.iterdir() if path.name.endswith(".part")]
    assert [path.name for path in sorted(tmp_path.glob("*.json"))] == ["shard-00000-of-00003.json", "unfinished.json"]
    again = _Interrupted(_records(6), at=None)
    assert write_shards(tmp_path, again, info, 3, form=arrays.FORM)
    assert again.asked == [2, 4]
    assert _values(tmp_path) == list(range(6))
    np.testing.assert_array_equal(np.load(tmp_path / "shard-00001-of-00003.label.npy"), np.array([0, 1], np.int32))

    tokens = tmp_path / "shard-00001-of-00003.tokens.npy"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=r"tokens\.npy cannot be read .* copy it again"):
        open_records(tmp_path)
    tokens.write_bytes((tmp_path / "shard-00000-of-00003.label.npy").read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"tokens\.npy cannot be read"):
        open_records(tmp_path)
    np.save(tokens, np.zeros((5, 2, 3, 1), np.int32))
    with pytest.raises(ValueError, match=r"holds 5 records, shard-00001-of-00003\.json says 2"):
        open_records(tmp_path)
    tokens.unlink()
    with pytest.raises(ValueError, match=r"tokens\.npy cannot be read"):
        open_records(tmp_path)


def test_records_of_other_shapes_and_labels_outside_the_classes_are_refused(tmp_path):
    records = [{"tokens": np.zeros((1, n, 1), np.uint8), "label": n} for n in (3, 4)]
    with pytest.raises(ValueError, match=r"a record is uint8 \[1, 4, 1\], those before it uint8 \[1, 3, 1\]"):
        write_shards(tmp_path / "a", records, {"form": arrays.NAME}, 1, form=arrays.FORM)
    write_shards(tmp_path / "b", records[:1], {"form": arrays.NAME, "classes": 2}, 1, form=arrays.FORM)
    data = Data(name="tokens", path=str(tmp_path / "b"))
    with pytest.raises(ValueError, match=r"label 3, outside 0\.\.1"):
        next(batches(open_source(data), data, batch=1, seed=0))
