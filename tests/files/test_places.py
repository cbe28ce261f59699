"""Nothing is written into a folder `gs:` of the disk."""


import pytest

from ar_jax.config import Experiment, parse
from ar_jax.files.places import on_disk

COMMANDS = (
    ("ar_jax.sample", "gs://bucket/runs/mine"),
    ("ar_jax.tokenize", "runs/mine", "--out", "s3://bucket/cache"),
    ("ar_jax.evaluate", "generation", "gs://bucket/a.npz"),
    ("ar_jax.convert", "model.pt", "gs://bucket/model"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_places_that_are_no_disks_are_refused_in_one_sentence(command, monkeypatch, capsys):
    module = __import__(command[0], fromlist=["main"])
    if command[0] == "ar_jax.convert":
        module = __import__("ar_jax.convert.__main__", fromlist=["main"])
    with pytest.raises(SystemExit) as refused:
        module.main(list(command[1:]))
    said = str(refused.value.code)
    assert "files are read and written on disks only; mount the " in said + capsys.readouterr().err


def test_settings_of_a_config_are_looked_through():
    with pytest.raises(ValueError, match=r"^out is 'gs://bucket/runs', but files are .*; mount the gs storage"):
        parse(Experiment(name="x"), ["--out", "gs://bucket/runs"], "train.py", "")
    with pytest.raises(ValueError, match=r"^generator.tokens is 's3:/a/b', but"):
        parse(Experiment(name="x"), ["--generator.tokens", "s3:/a/b"], "train.py", "")
    assert on_disk(["runs/a", "my_module:function", "C", "--out=runs/a:b"])
