"""Numbers of classes: one order everywhere, and names are compared where two sets meet."""

import dataclasses
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data.packing import add, png
from PIL import Image

from ar_jax.config import Experiment, GeneratorStage, TokenizerStage
from ar_jax.data import (
    Data,
    Info,
    Opened,
    arrays,
    batches,
    folder,
    in_order,
    label_ids,
    open_source,
    renumbered,
    sources,
    write_shards,
)
from ar_jax.evals.classifier import Classifier
from ar_jax.evals.images import labels_in, open_images
from ar_jax.generators.causal import Causal
from ar_jax.nets.conditioning import Label
from ar_jax.nets.transformer import Transformer
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.train import __main__ as train

AS_TEXT = ("0", "1", "10", "11", "2")


@pytest.fixture
def numbers(tmp_path):
    """Folders 0, 1, 2, 10, 11 with an image each, as grey as its class."""
    for name in AS_TEXT:
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (int(name),) * 3).save(tmp_path / "data" / name / "a.png")
    return Data(name="image_folder", path=str(tmp_path / "data"), size=8)


def by_grey(source):
    return {source[i]["image"].getpixel((0, 0))[0]: source[i]["label"] for i in range(len(source))}


def test_whole_numbers_sort_as_numbers_and_all_else_as_text():
    assert in_order(["b", "10", "9", "a2", "a10", "010", "0", "³", "-1"]) == [
        "0",
        "9",
        "010",
        "10",
        "-1",
        "a10",
        "a2",
        "b",
        "³",
    ]
    assert in_order(["9" * 5000, "8"]) == ["8", "9" * 5000]


def test_folders_and_captions_and_the_evaluator_number_alike(numbers):
    right = {0: 0, 1: 1, 2: 2, 10: 3, 11: 4}
    assert by_grey(open_source(numbers)) == right
    images = open_images(numbers.path)
    assert images.names == open_source(numbers).info.class_names == ("0", "1", "2", "10", "11")
    assert dict(zip(images.read(range(5))[:, 0, 0, 0].tolist(), images.labels.tolist())) == right
    lines = [f'{{"file": "{name}/a.png", "caption": "", "label": "{name}"}}' for name in AS_TEXT]
    (Path(numbers.path) / "captions.jsonl").write_text("\n".join(lines))
    assert by_grey(open_source(numbers)) == right


def test_labels_are_carried_over_by_name():
    labels = np.array([0, 1, 2, 2, -1])
    assert renumbered(labels, ("a", "b", "c"), ("c", "b", "a")).tolist() == [2, 1, 0, 0, -1]
    assert renumbered(labels, ("a", "b", "c"), ("a", "c")).tolist() == [0, -1, 1, 1, -1]
    assert renumbered(labels, ("3", "07", "900"), ()).tolist() == [3, 7, 900, 900, -1]
    assert renumbered(labels, (), ("2", "1", "0")).tolist() == [2, 1, 0, 0, -1]
    assert renumbered(labels, ("a", "b", "c"), ()).tolist() == labels.tolist()
    assert renumbered(labels, (), ()).tolist() == labels.tolist()


def test_labels_of_two_sets_meet_by_their_names(tmp_path):
    for place, names in (("ours", ("cat", "dog")), ("theirs", ("ant", "cat", "dog"))):
        for name in names:
            (tmp_path / place / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / place / name / "a.png")
    ours, theirs = (open_images(str(tmp_path / place)) for place in ("ours", "theirs"))
    assert labels_in(ours, theirs.names, "theirs").tolist() == [1, 2]
    with pytest.raises(ValueError, match="theirs has classes such as ant that ours does not have"):
        labels_in(theirs, ours.names, "ours")
    assert Classifier(len, 1.0, {}).names == ()


def stage_data(monkeypatch, tmp_path, data, tokens=""):
    """The source that a generator would be trained on, and what its model.json says of classes."""
    seen = []
    module = VQGAN((8, 8), features=4, mult=(1, 1), res_blocks=0, latent=4, codes=16, code_features=4, groups=2)
    generator = Causal(Transformer(1, 16, 2, hidden=24), Label(16))
    experiment = Experiment(
        name="run", out=str(tmp_path), data=data, tokenizer=TokenizerStage(module=module, steps=1, batch=8),
        generator=GeneratorStage(module=generator, steps=1, batch=8, tokens=tokens),
    )  # fmt: skip
    monkeypatch.setattr(train, "stage_fit", lambda *given: seen.append((given[4](given[3]), given[5].info)))
    monkeypatch.setattr(train, "measured", lambda tokenizer, *_: tokenizer)
    monkeypatch.setattr(train, "generator_recipe", lambda *_: None)
    monkeypatch.setattr(train, "check_cache", lambda *_: None)
    monkeypatch.setattr(train.Model, "params", lambda self: {})
    monkeypatch.setattr(train, "keep_config", lambda *_: None)
    train.train(experiment, "", [])
    return seen[-1]


def test_a_run_of_an_earlier_version_keeps_its_numbers_and_says_so(numbers, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as old:
        old.setattr(folder, "in_order", sorted)
        stage_data(monkeypatch, tmp_path, numbers)
    source, info = stage_data(monkeypatch, tmp_path, numbers)
    assert info.class_names == AS_TEXT
    assert by_grey(source) == {0: 0, 1: 1, 10: 2, 11: 3, 2: 4}
    said = capsys.readouterr().out
    assert "its classes (0, 1, 2, 10, 11, ...) are numbered as in" in said
    assert "(0, 1, 10, 11, 2, ...)" in said
    (Path(numbers.path) / "3").mkdir()
    Image.new("RGB", (8, 8)).save(Path(numbers.path) / "3" / "a.png")
    with pytest.raises(ValueError, match=r"has classes such as 3 that .*generator does not have"):
        stage_data(monkeypatch, tmp_path, numbers)


@pytest.mark.parametrize("form", [None, arrays.FORM])
def test_splits_of_a_cache_written_in_two_orders_are_numbered_alike(tmp_path, form):
    for split, names in (("train", AS_TEXT), ("val", ("0", "1", "2", "10", "11"))):
        records = [
            {"tokens": np.full((1, 4, 1), int(name), np.int32), "label": label} for label, name in enumerate(names)
        ]
        info = dataclasses.asdict(Info(classes=5, class_names=names)) | ({"form": arrays.NAME} if form else {})
        write_shards(tmp_path / split, records, info, 1, form=form)
    opened, data = Opened(), Data(name="tokens", path=str(tmp_path))
    for source in (opened(data), opened(dataclasses.replace(data, split="test"))):
        labels = {int(source[i]["tokens"][0, 0, 0]): source[i]["label"] for i in range(5)}
        assert labels == {0: 0, 1: 1, 10: 2, 11: 3, 2: 4}
        batch = next(iter(batches(source, data, batch=5, seed=0, train=False)))
        assert dict(zip(batch["tokens"][:, 0, 0].tolist(), batch["label"].tolist())) == labels
        assert source.info.class_names == AS_TEXT


LABELS = (3, 900, 7, 3, 20231126)


def labelled(place, kind, labels):
    """Black images with labels that are numbers, as what `kind` is."""
    place.mkdir()
    file = png(np.zeros((8, 8, 3), np.uint8))
    if kind == "image_folder":
        (place / "a.png").write_bytes(file)
        lines = [f'{{"file": "a.png", "caption": "", "label": {label}}}' for label in labels]
        (place / "captions.jsonl").write_text("\n".join(lines))
    elif kind == "webdataset":
        with tarfile.open(place / "a.tar", "w") as tar:
            for i, label in enumerate(labels):
                add(tar, f"{i:06d}.png", file)
                add(tar, f"{i:06d}.cls", str(label).encode())
    else:
        rows = pytest.importorskip("datasets").Dataset.from_dict(
            {"image": [{"bytes": file}] * len(labels), "label": labels}
        )
        if kind == "huggingface":
            rows.save_to_disk(place)
        else:
            rows.to_parquet(place / "a.parquet")
    return Data(name=kind, path=str(place), size=8)


@pytest.mark.parametrize("kind", ["image_folder", "webdataset", "huggingface", "parquet"])
def test_classes_of_numbers_are_those_seen_with_their_names(tmp_path, kind):
    source = open_source(labelled(tmp_path / "gaps", kind, LABELS))
    assert source.info.class_names == ("3", "7", "900", "20231126")
    assert [source[i]["label"] for i in range(5)] == [0, 2, 1, 0, 3]
    assert label_ids(source.info, ["900", "3"]) == [2, 0]
    with pytest.raises(ValueError, match=r"no class '1'; .*there are 3, 7, 900, 20231126$"):
        label_ids(source.info, ["1"])
    dense = open_source(labelled(tmp_path / "dense", kind, (2, 0, 1)))
    assert (dense.info.classes, dense.info.class_names) == (3, ())
    assert [dense[i]["label"] for i in range(3)] == [2, 0, 1]
    old, data = Opened(), labelled(tmp_path / "old", kind, LABELS[:4])
    old.like(data, Info(classes=901), "runs/old/generator")  # a run of an earlier version
    assert [old(data)[i]["label"] for i in range(4)] == [3, 900, 7, 3]
    assert old(data).info.classes == 901


def test_a_table_too_large_is_refused_when_data_are_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MOST_CLASSES", 3)
    with pytest.raises(ValueError, match="has 4 classes, such as 20231126, of 3 at most; are its labels dates"):
        open_source(labelled(tmp_path / "gaps", "image_folder", LABELS))
