"""Nothing is written into a folder `gs:` of the disk, and what cannot be reached is refused in one sentence."""

from pathlib import Path

import bucket
import pytest

from ar_jax.config import Experiment, parse
from ar_jax.files import places
from ar_jax.files.places import on_disk, path_of, reachable

COMMANDS = (
    ("ar_jax.sample", "az://bucket/runs/mine"),
    ("ar_jax.tokenize", "runs/mine", "--out", "http://bucket/cache"),
    ("ar_jax.evaluate", "generation", "az://bucket/a.npz"),
    ("ar_jax.convert.__main__", "model.pt", "--to=az://bucket/model"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_addresses_that_nothing_reaches_are_refused_in_one_sentence(command, capsys):
    module = __import__(command[0], fromlist=["main"])
    with pytest.raises(SystemExit) as refused:
        module.main(list(command[1:]))
    said = str(refused.value.code)
    assert (
        "is not reached: files lie on disks or in buckets, gs://BUCKET/... and s3://" in said + capsys.readouterr().err
    )


def test_settings_of_a_config_are_looked_through():
    with pytest.raises(ValueError, match=r"^out is 'az://bucket/runs' is not reached: files .*; mount the az storage"):
        parse(Experiment(name="x"), ["--out", "az://bucket/runs"], "train.py", "")
    with pytest.raises(ValueError, match=r"^generator.tokens is 'hdfs:/a/b' is not"):
        parse(Experiment(name="x"), ["--generator.tokens", "hdfs:/a/b"], "train.py", "")
    assert reachable(["runs/a", "my_module:function", "C", "--out=runs/a:b"])


def test_what_lies_on_disks_only_is_refused_in_one_sentence():
    with (
        bucket.standing_in(),
        pytest.raises(ValueError, match=r"^the config is 's3://b/c.py', but is on a disk only: copy"),
    ):
        on_disk("s3://b/c.py", "the config")


def test_a_missing_client_is_named(monkeypatch):
    places._client.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(ValueError, match=r"^s3:// needs a client \(.*\): pip install 'ar_jax\[remote\]'"):
        path_of("s3://bucket/runs")


def test_paths_of_disks_stay_as_they_are():
    assert type(path_of("runs/a:b/../c")) is type(Path("runs"))
    assert str(path_of("runs/a:b/../c")) == "runs/a:b/../c"
    with bucket.standing_in():
        assert str(path_of(Path("gs://bucket/run")) / "x") == "gs://bucket/run/x", "Path takes one of two slashes"
        assert str(path_of(path_of("gs://bucket/run/generator") / "../tokenizer")) == "gs://bucket/run/tokenizer"
