"""Runs, model folders, samples, results, token caches and data in buckets, beside the same on disk."""

import io
import json

import bucket
import jax
import numpy as np
import pytest
from data.packing import pack
from evals.tiny import tiny_network
from kill_training import arrays
from PIL import Image
from test_train_sample import CONFIG, QUIET, quick  # noqa: F401

import ar_jax
from ar_jax import sample, tokenize
from ar_jax.data import Data, Info, open_records, open_source
from ar_jax.evals import extract
from ar_jax.evaluate import Generation, Judge, evaluate_generation
from ar_jax.files import places
from ar_jax.files.models import describe, open_model
from ar_jax.files.places import local, path_of
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.train import __main__ as train
from ar_jax.train import log
from ar_jax.train.checkpoint import save_params

SMALL = CONFIG.replace("Transformer(2, 16, 2, hidden=24, dropout=0.1)", "Transformer(1, 16, 2, hidden=16)")
RUNS, VQ = "gs://bucket/runs", "gs://bucket/checkpoints/vq"


@pytest.fixture(scope="module", autouse=True)
def objects():
    with bucket.standing_in() as found:
        yield found


@pytest.fixture(scope="module")
def place(tmp_path_factory, objects):
    """A config on disk; and in the bucket the tokenizer that it takes."""
    module = VQGAN((32, 32), features=4, mult=(1, 1, 2), res_blocks=0, latent=4, codes=16, code_features=4, groups=2)
    describe(path_of(VQ), "tokenizer", module, Info(), {"data": {"name": "mnist5k", "size": 32}})
    save_params(path_of(VQ) / "params", jax.jit(module.init_params)(jax.random.key(0)))
    root = tmp_path_factory.mktemp("buckets")
    (root / "tiny.py").write_text(SMALL)
    return root


def trained(place, out, *options):
    train.main([str(place / "tiny.py"), "--out", str(out), "--tokenizer.path", VQ, *options])


@pytest.fixture(scope="module")
def whole(place):
    trained(place, place, *QUIET)
    return place / "whole"


@pytest.fixture(scope="module")
def stopped(place):
    """What a training said whose last checkpoint could not be sent to its end."""
    with bucket.down("generator/checkpoints/6/training/_METADATA"), pytest.raises(SystemExit) as caught:
        trained(place, RUNS, *QUIET)
    return caught.value.code, sorted(bucket.OBJECTS), open_model(f"{RUNS}/whole", "generator").fixed().checkpoint


@pytest.fixture(scope="module")
def run(place, stopped):
    trained(place, RUNS)
    return path_of(RUNS) / "whole"


def test_a_half_written_checkpoint_is_none(stopped):
    said, names, newest = stopped
    assert f"could not write a checkpoint to {RUNS}/whole/generator/checkpoints" in said
    assert newest == "3"
    assert any(name.startswith("bucket/runs/whole/generator/checkpoints/6/") for name in names)


def test_a_stopped_run_goes_on_to_the_same_bits(run, whole, objects):
    assert arrays(run, "generator") == arrays(whole, "generator")
    assert not [name for name in objects if "broken" in name or "tmp" in name], "a bucket renames nothing"
    assert (run / "config.py").read_text() == SMALL
    lines, theirs = (
        [json.loads(line) for line in (each / "generator/metrics.jsonl").read_text().splitlines()]
        for each in (run, whole)
    )
    assert [line["step"] for line in lines] == [3, 6, 6]
    assert lines[-2]["loss"] == theirs[-1]["loss"]
    events = b"".join(
        content for name, (_, content) in objects.items() if "whole/generator/events.out.tfevents" in name
    )
    assert events.count(b"images_per_second_per_chip") >= 2
    assert np.asarray(Image.open(io.BytesIO(objects["bucket/runs/whole/generator/samples/0000006.png"][1]))).ndim == 3


def test_a_checkpoint_that_lost_something_is_gone_back_from(run, place, objects):
    name = next(name for name in objects if name.startswith("bucket/runs/whole/generator/checkpoints/6/ema/d/"))
    before = dict(objects)
    objects[name] = objects[name][0], objects[name][1][:-1]
    assert open_model(run, "generator").fixed().checkpoint == "3"
    trained(place, RUNS, *QUIET)
    assert "bucket/runs/whole/generator/checkpoints/6.broken/contents.json" in objects
    assert open_model(run, "generator").fixed().checkpoint == "6"
    objects.clear()
    objects.update(before)


def test_samples_are_those_of_a_run_on_disk_and_are_gone_on_with(run, whole, objects, place):
    options = ("--count", "6", "--batch", "3", "--out")
    with bucket.down("/000003.npz"), pytest.raises(SystemExit, match="the network is down"):
        sample.main([str(run), *options, "s3://other/drawn/x.npz"])
    assert "other/drawn/.x.npz.parts/000000.npz" in objects
    assert "other/drawn/x.npz" not in objects
    sample.main([str(run), *options, "s3://other/drawn/x.npz"])
    assert [name for name in objects if name.startswith("other/")] == ["other/drawn/x.npz"]
    sample.main([str(whole), *options, str(place / "x.npz")])
    drawn = np.load(io.BytesIO(objects["other/drawn/x.npz"][1]))["arr_0"]
    np.testing.assert_array_equal(drawn, np.load(place / "x.npz")["arr_0"])
    for _ in range(2):  # all of them are there already
        sample.main([str(run), "--count", "3", "--batch", "3", "--out", "gs://bucket/folder"])
    files = [name for name in objects if name.startswith("bucket/folder/")]
    assert sorted(files) == [*(f"bucket/folder/{i:06d}.png" for i in range(3)), "bucket/folder/sampling.json"]
    np.testing.assert_array_equal(Image.open(io.BytesIO(objects["bucket/folder/000002.png"][1])), drawn[2])
    jax.tree.map(np.testing.assert_array_equal, ar_jax.load(run).params, ar_jax.load(whole).params)


def test_results_are_those_of_samples_on_disk(place, objects, monkeypatch):
    monkeypatch.setattr(extract, "matmul_peak", lambda dtype: 1.0)  # which takes its time to measure
    np.savez(place / "b.npz", np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8))
    np.savez(place / "a.npz", np.random.default_rng(1).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8))
    found = []
    for root, out in ((place, place / "a.json"), (sent(place, "a.npz", "b.npz"), "gs://bucket/results/a.json")):
        options = Generation(
            samples=f"{root}/a.npz", reference=f"{root}/b.npz", out=str(out), kid_size=20, judge=Judge(batch=32),
            metrics=("fd", "kid"), report=False,
        )  # fmt: skip
        found.append(evaluate_generation(options, tiny_network())["figures"])
    assert found[0] == found[1]
    assert sorted(name for name in objects if "/results/" in name) == ["bucket/results/a.json"]


def sent(folder, *names):
    """What is in a folder, in a bucket."""
    for path in [folder / name for name in names] or folder.rglob("*"):
        if path.is_file():
            bucket.put(f"bucket/sent/{folder.name}/{path.relative_to(folder)}", path.read_bytes())
    return f"gs://bucket/sent/{folder.name}"


@pytest.fixture(scope="module")
def digits():
    source = open_source(Data())
    order = sorted(range(0, len(source), 150), key=lambda i: source.labels[i])
    return [source[i]["image"] for i in order], [source.labels[i] for i in order], source.info.class_names


@pytest.mark.parametrize("name", ["image_folder", "webdataset", "parquet", "huggingface"])
def test_data_are_those_on_disk(name, digits, tmp_path):
    folder = pack(tmp_path, name, *digits, shards=2)
    here, there = (open_source(Data(name=name, path=str(path))) for path in (folder, sent(folder)))
    assert here.info == there.info
    assert len(here) == len(there) == 30
    for i in (0, 17, 29):
        np.testing.assert_array_equal(here[i]["image"], there[i]["image"])
        assert here[i]["label"] == there[i]["label"]


def test_splits_and_captions_are_those_on_disk(digits, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "deep").mkdir(parents=True)
        for i in range(3):
            Image.fromarray(digits[0][i]).save(tmp_path / split / "deep" / f"{i}.png")
    sources = [
        open_source(Data(name="image_folder", path=str(path), split="test")) for path in (tmp_path, sent(tmp_path))
    ]
    assert [len(source) for source in sources] == [3, 3]
    assert sources[0].info == sources[1].info
    lines = [json.dumps({"file": f"deep/{i}.png", "caption": f"the digit {i}"}) for i in (2, 1)]
    (tmp_path / "val" / "captions.jsonl").write_text("\n".join(lines))
    captioned = open_source(Data(name="image_folder", path=sent(tmp_path / "val")))
    assert captioned[0]["caption"] == "the digit 2"
    np.testing.assert_array_equal(captioned[0]["image"], digits[0][2])


def test_a_token_cache_is_copied_once_and_mapped(place, digits, tmp_path, objects):
    folder = pack(tmp_path, "image_folder", *digits, shards=1)
    for data, out in ((sent(folder), "gs://bucket/cache/train"), (folder, tmp_path / "cache")):
        options = ("--data.name", "image_folder", "--data.path", str(data), "--shards", "2")
        tokenize.main([VQ, "--out", str(out), *options])
        tokenize.main([VQ, "--out", str(out), *options])  # it is complete
    there, here = open_records("gs://bucket/cache/train"), open_records(tmp_path / "cache")
    assert here.fields == there.fields
    index = np.arange(30)
    for name, array in here.gather(index, index * 0).items():
        np.testing.assert_array_equal(array, there.gather(index, index * 0)[name])
    copy = local(path_of("gs://bucket/cache/train"))
    stamps = {path: path.stat().st_mtime_ns for path in copy.iterdir()}
    assert len(open_source(Data(name="tokens", path="gs://bucket/cache/train"))) == 30
    assert stamps == {path: path.stat().st_mtime_ns for path in copy.iterdir()}
    bucket.put("bucket/cache/train/info.json", objects["bucket/cache/train/info.json"][1])
    assert local(path_of("gs://bucket/cache/train")) != copy, "what was written anew is copied anew"


def test_what_does_not_fit_is_not_copied(objects, monkeypatch):
    bucket.put("bucket/large/a", bytes(1000))
    monkeypatch.setattr(places.shutil, "disk_usage", lambda folder: type("", (), {"free": 999}))
    with pytest.raises(
        ValueError, match=r"^gs://bucket/large has 0.0 GB, which are copied to .*; name a larger disk in AR_"
    ):
        local(path_of("gs://bucket/large"))
    with pytest.raises(FileNotFoundError, match="gs://bucket/none does not exist"):
        local(path_of("gs://bucket/none"))


def test_lines_are_added_to_those_of_before_and_events_are_sent_in_parts(objects, monkeypatch):
    bucket.put("bucket/log/metrics.jsonl", b"before\n")
    file = log.Anew(path_of("gs://bucket/log/metrics.jsonl"))
    file.write("one\n")
    assert objects["bucket/log/metrics.jsonl"][1] == b"before\n"
    monkeypatch.setattr(log, "PERIOD", 0)
    file.write("two\n")
    assert objects["bucket/log/metrics.jsonl"][1] == b"before\none\ntwo\n"
    monkeypatch.setattr(log, "PART", 3)
    events = log.Events("gs://bucket/log/events.out.tfevents.1.host")
    for record in (b"12", b"34", b"56"):
        events.write(record)
        events.flush()
    with bucket.down("metrics"):  # no run ends for it
        file.close()
    assert {name[-1]: content for name, (_, content) in objects.items() if "/log/ev" in name} == {
        "0": b"1234",
        "1": b"56",
    }
