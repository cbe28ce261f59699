import dataclasses
import json
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from ar_jax.data import Data, Info, batches, captions, open_source
from ar_jax.data.captions import left_pad
from ar_jax.files import cache
from ar_jax.text import minilm


@pytest.fixture
def captioned(tmp_path):
    lines = []
    for i, caption in enumerate(("one", "two words", "one")):
        Image.new("RGB", (4, 4), (i, i, i)).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"file": f"{i}.png", "caption": caption}))
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    return tmp_path


def _data(folder, text, **fields):
    return Data(name="image_folder", path=str(folder), size=4, text=str(text), **{"text_rows": 3} | fields)


FEATURES = np.arange(3 * 4 * 2, dtype=np.float32).reshape(3, 4, 2) + 1
MASK = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]], bool)


def test_rows_are_padded_on_the_left_and_cut_at_the_end():
    features, mask = left_pad(FEATURES[1], MASK[1], 3)
    assert features.tolist() == [[0, 0], [9, 10], [11, 12]]
    assert mask.tolist() == [False, True, True]
    assert left_pad(FEATURES[2], MASK[2], 3)[0].tolist() == FEATURES[2, :3].tolist()
    assert left_pad(features, mask, 3)[0].tolist() == features.tolist()


@pytest.mark.parametrize("end", [".npz", ".safetensors"])
def test_features_of_a_file_stand_beside_their_images(captioned, end):
    path = captioned / f"features{end}"
    if end == ".npz":
        np.savez(path, features=FEATURES.astype(np.float16), mask=MASK, encoder="minilm")
    else:
        save_file({"features": FEATURES, "mask": MASK}, path, {"encoder": "minilm"})
    data = _data(captioned, path)
    source = open_source(data)
    assert (source.info.text, source.info.text_rows, source.info.text_width) == ("minilm", 3, 2)
    batch = next(batches(source, data, batch=3, seed=0))
    assert (batch["text"].dtype, batch["text_mask"].dtype) == (np.float32, bool)
    for image, text, mask in zip(batch["image"], batch["text"], batch["text_mask"], strict=True):
        expected = left_pad(FEATURES[image[0, 0, 0]], MASK[image[0, 0, 0]], 3)
        np.testing.assert_array_equal(text, expected[0])
        np.testing.assert_array_equal(mask, expected[1])
    with futures.ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda i: source[i % 3]["text"], range(60)))
    assert all((text == left_pad(FEATURES[i % 3], MASK[i % 3], 3)[0]).all() for i, text in enumerate(texts))


def test_a_replaced_image_keeps_its_own_caption(captioned):
    (captioned / "0.png").write_bytes(b"")
    np.savez(captioned / "f.npz", features=FEATURES, mask=MASK)
    record = open_source(_data(captioned, captioned / "f.npz", unreadable="skip"))[0]
    assert record["caption"] == "two words"
    assert record["text"].tolist() == left_pad(FEATURES[1], MASK[1], 3)[0].tolist()


def test_features_that_do_not_fit_are_refused(captioned):
    path = captioned / "f.npz"
    with pytest.raises(FileNotFoundError, match=r"data\.text is"):
        open_source(_data(captioned, path))
    np.savez(path, features=FEATURES[:2], mask=MASK[:2])
    with pytest.raises(ValueError, match=r"features \[2, 4, 2\].*needed are \[3 rows c\]"):
        open_source(_data(captioned, path))
    np.savez(path, features=FEATURES)
    with pytest.raises(ValueError, match="must hold `features`"):
        open_source(_data(captioned, path))
    np.savez(path, features=np.array([None] * 3), mask=MASK)  # would need pickle
    with pytest.raises(ValueError, match="must hold `features`"):
        open_source(_data(captioned, path))
    (captioned / "f.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="must hold `features`"):
        open_source(_data(captioned, captioned / "f.safetensors"))
    with pytest.raises(ValueError, match="must be empty, minilm, a folder"):
        open_source(_data(captioned, "t5"))


def test_text_without_captions_is_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="has no captions"):
        open_source(_data(tmp_path, "minilm"))


@pytest.fixture
def encoder(monkeypatch, tmp_path_factory):
    """A stand-in for MiniLM (features are the number of words) with an empty cache; the captions it was asked for."""
    asked = []

    def encode(captions, rows):
        asked.extend(captions)
        length = np.array([len(caption.split()) for caption in captions])
        features = np.tile(length[:, None, None].astype(np.float32), (1, rows, 5))
        return features, np.arange(rows) < length[:, None]

    monkeypatch.setattr(minilm, "encode", encode)
    monkeypatch.setattr(minilm, "identity", lambda: "stand-in")
    monkeypatch.setenv("AR_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
    return asked


def test_minilm_encodes_each_caption_once(captioned, encoder):
    source = open_source(_data(captioned, "minilm"))
    assert encoder == ["one", "two words"]
    assert (source.info.text, source.info.text_width) == ("minilm", 5)
    assert [source[i]["text_mask"].sum() for i in range(3)] == [1, 2, 1]
    assert source[1]["text"][:, 0].tolist() == [0, 2, 2]


def test_features_of_captions_are_kept_on_disk(captioned, encoder, monkeypatch):
    monkeypatch.setattr(captions, "PART", 1)
    first = open_source(_data(captioned, "minilm"))
    again = open_source(_data(captioned, "minilm"))
    assert encoder == ["one", "two words"]
    for i in range(3):
        np.testing.assert_array_equal(first[i]["text"], again[i]["text"])
        assert first[i]["text"].dtype == jnp.bfloat16
    rows = sum(load_file(path)["rows"].nbytes for path in captions.cache.place("captions").iterdir())
    assert rows == (1 + 2) * 5 * 2, "of one and two words, each five numbers of two bytes"
    (captioned / "captions.jsonl").open("a").write('\n{"file": "0.png", "caption": "and three words"}')
    open_source(_data(captioned, "minilm"))
    assert encoder == ["one", "two words", "and three words"], "only what is new"
    open_source(_data(captioned, "minilm", text_rows=4))
    assert len(encoder) == 6, "other rows, other features"
    kept = sorted(captions.cache.place("captions").iterdir())
    assert len(kept) == 6, "and no parts of files"
    for path in kept:
        path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"features of captions that were kept, is damaged .*delete it"):
        open_source(_data(captioned, "minilm"))


def test_where_nothing_can_be_kept_features_are_made_for_this_process(captioned, encoder, monkeypatch, caplog):
    (captioned / "file").write_text("")
    monkeypatch.setenv("AR_JAX_CACHE", str(captioned / "file"))
    assert open_source(_data(captioned, "minilm"))[1]["text"][:, 0].tolist() == [0, 2, 2]
    assert "nothing can be kept in" in caplog.text


def test_processes_that_share_a_cache_share_the_work(monkeypatch, tmp_path):
    paths, made = [tmp_path / str(i) for i in range(4)], []

    def process(number, then=lambda: None):
        def write(i, path):
            made.append((number, i))
            path.write_text(str(i))
            then()

        with monkeypatch.context() as patch:
            patch.setattr(jax.distributed, "is_initialized", lambda: True)
            patch.setattr(jax, "process_index", lambda: number)
            patch.setattr(jax, "process_count", lambda: 2)
            cache.make(paths, write)

    process(0, then=lambda: len(made) == 1 and process(1))  # the second one works while the first writes its first file
    assert made == [(0, 0), (1, 2), (1, 3), (1, 0), (1, 1)]
    assert [path.read_text() for path in paths] == list("0123")


def images(place, *names):
    for name in names:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(place / name)
    return Data(name="image_folder", path=str(place))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (
            "metadata.jsonl",
            '{"file_name": "b.png", "text": "a bee"}\n{"file_name": "sub/a.png", "text": ["an ape", "ape"]}\n',
        ),
        ("metadata.csv", "file_name,prompt,width\nb.png,a bee,8\nsub/a.png,an ape,8\n"),
    ],
)
def test_captions_of_hugging_faces_image_folders_are_read(tmp_path, file, text):
    data = images(tmp_path / "train", "b.png", "sub/a.png", "c.png")
    (tmp_path / "train" / file).write_text(text)
    source = open_source(data)
    assert (source.info, list(source.captions())) == (Info(captions=True), ["a bee", "an ape"])
    images(tmp_path / "val", "b.png", "sub/a.png")
    (tmp_path / "val" / file).write_text(text)
    assert len(open_source(dataclasses.replace(data, path=str(tmp_path), split="test"))) == 2


def test_metadata_without_captions_leaves_classes_or_gives_labels(tmp_path, capsys):
    data = images(tmp_path, "cat/a.png", "dog/b.png")
    (tmp_path / "metadata.csv").write_text("file_name,licence\ncat/a.png,CC0\n")
    assert open_source(data).info == Info(classes=2, class_names=("cat", "dog"))
    assert "1 unread caption file (metadata.csv); read are captions.jsonl" in capsys.readouterr().out
    (tmp_path / "metadata.csv").write_text("file_name,label\ncat/a.png,x\ndog/b.png,y\n")
    source = open_source(data)
    assert (source.info, [source[i]["label"] for i in range(2)]) == (Info(classes=2, class_names=("x", "y")), [0, 1])


def test_a_text_beside_every_image_is_its_caption(tmp_path, capsys):
    data = images(tmp_path, "cat/a.png", "dog/b.jpg")
    (tmp_path / "cat" / "a.txt").write_text("\ufeffEin Ä \n", encoding="utf-8")
    assert open_source(data).info == Info(classes=2, class_names=("cat", "dog"))
    assert "1 of 2 images have a .txt beside them; captions are read if all have one" in capsys.readouterr().out
    (tmp_path / "dog" / "b.txt").write_text("a dog")
    source = open_source(data)
    assert source.info == Info(classes=2, class_names=("cat", "dog"), captions=True)
    assert list(source.captions()) == [source[i]["caption"] for i in range(2)] == ["Ein Ä", "a dog"]
    assert not capsys.readouterr().out
    (tmp_path / "dog" / "b.txt").write_bytes("ein Ä".encode("cp1252"))
    with pytest.raises(
        ValueError, match=r"b\.txt line 1 is not UTF-8 \(byte 5 of it is 0xc4; it looks like Windows-1252"
    ):
        source.captions()[1]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("captions.csv", "file,caption\na.png,ok\na.png,für\n".encode("cp1252"), r"line 3 is not UTF-8 .*0xfc.*Windows-1252"),
        ("captions.csv", "file,caption\na.png,für\n".encode("utf-16"), r"line 1 is not UTF-8 but looks like UTF-16"),
        ("captions.jsonl", '{"file": "a.png", "caption": "x"}'.encode("utf-16-le"), "line 1 .*UTF-16"),
        ("captions.jsonl", b'\n{"file": "a.png", "caption": "\xe9"}', r"line 2 is not UTF-8"),
        ("captions.csv", b'file,caption\na.png,ok\na.png,"' + b"x" * 140_000, r"line 3 cannot be read as CSV: field larger"),
        ("metadata.csv", b'file_name,text\na.png,"' + b"x" * 140_000, r"line 2 cannot be read as CSV: field larger"),
    ],
)  # fmt: skip
def test_caption_files_that_cannot_be_read_are_named_with_line_and_encoding(tmp_path, file, content, message):
    data = images(tmp_path, "a.png")
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file} {message}"):
        open_source(data)


def test_of_two_caption_files_the_one_that_is_not_read_is_named(tmp_path, capsys):
    data = images(tmp_path, "a.png")
    (tmp_path / "captions.csv").write_text("file,caption\na.png,one\n")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "two"}\n')
    assert list(open_source(data).captions()) == ["one"]
    assert "captions are those of captions.csv; passed over metadata.jsonl" in capsys.readouterr().out
