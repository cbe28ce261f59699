"""A run as one page, and figures beside the run folder."""

import html.parser
import json
import sys
import types

import numpy as np
import pytest

from ar_jax import watch
from ar_jax.config import load_config
from ar_jax.files import codec
from ar_jax.files.images import save_picture
from ar_jax.train import wandb
from ar_jax.train.log import Log

VOID = {"meta", "img", "line", "polyline", "circle"}


class Checked(html.parser.HTMLParser):
    """Tags are closed in their order; what a page names is inside it."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open and self.open[-1] not in ("style", "script") else ""


def lines(folder, *values):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))


@pytest.fixture
def run(tmp_path):
    """A run that was resumed, with a spike, a skipped update and a word about its codes."""
    run = tmp_path / "a <run>"
    experiment = codec.encode(load_config("configs/llamagen.py:mnist5k"))
    experiment["generator"]["optim"]["lr"] = 0.5
    experiment["generator"]["steps"] = 200
    (run / "generator").mkdir(parents=True)
    facts = {
        "config": "configs/llamagen.py:mnist5k",
        "overrides": ["--generator.optim.lr", "0.5"],
        "versions": {"jax": "1.2"},
    }
    (run / "run.json").write_text(json.dumps(facts | {"experiment": experiment}))
    lines(
        run / "generator",
        {"step": 50, "loss": 4.0, "lr": 0.5, "usage": 0.4, "usage/0": 0.3, "seconds_per_step": 2.0, "skipped_in_a_row": 0},
        {"step": 100, "loss": 9.0, "lr": 0.4, "usage": 0.5, "usage/0": 0.4, "seconds_per_step": 2.0, "skipped_in_a_row": 0},
        {"step": 70, "spike/loss": 30.0, "spike/mean": 3.5, "spike/deviation": 0.1},
        {"step": 80, "loss": None, "skipped_in_a_row": 1.0},
        {"step": 100, "loss": 3.0, "lr": 0.3, "usage": 0.5, "usage/0": 0.5, "seconds_per_step": 3.0, "skipped_in_a_row": 0},
        {"step": 100, "train_sample/loss": 3.25},
    )  # fmt: skip
    for step in range(10, 310, 10):
        save_picture(run / "generator" / "samples" / f"{step:07d}.png", np.full((16, 1600, 3), step % 256, np.uint8))
    return run


def test_a_run_becomes_a_page_that_needs_nothing_else(run, capsys):
    watch.main([str(run)])
    assert capsys.readouterr().out == f"{run / 'watch.html'}: generator 100 of 200\n"
    text = (run / "watch.html").read_text()
    read = Checked(text)
    assert all(link.startswith("data:image/webp;base64,") for link in read.links)
    assert len(read.links) == watch.PICTURES
    assert "http" not in text
    assert "a <run>" in read.text, "names are escaped"
    for words in (
        "train.py configs/llamagen.py:mnist5k --generator.optim.lr 0.5", "jax 1.2", "100 of 200", "5 minutes",
        "update 70: loss spike, 30 where the mean was 3.5", "update 80 was skipped", "no held-out images",
        "2 differ from", "generator.optim.lr0.50.002", "usage by part",
    ):  # fmt: skip
        assert words in read.text, words
    data = text.partition('id="data">')[2].partition("</script>")[0]
    (loss,) = (chart["series"] for chart in json.loads(data) if "train_sample" in chart["series"])
    assert loss == {"training": [[50, 4.0], [100, 3.0]], "train_sample": [[100, 3.25]]}, (
        "of an update, the later word counts"
    )


def test_a_page_is_written_anew_until_the_training_is_done(run, monkeypatch, tmp_path):
    waits = []

    def wait(seconds):
        waits.append(seconds)
        assert '<meta http-equiv="refresh" content="7">' in (tmp_path / "w.html").read_text()
        lines(run / "generator", {"step": 200, "loss": 1.0})

    monkeypatch.setattr(watch.time, "sleep", wait)
    watch.main([str(run), "--out", str(tmp_path / "w.html"), "--every", "7"])
    assert waits == [7]
    assert "refresh" not in (tmp_path / "w.html").read_text()


def test_logs_that_are_none_are_refused_and_half_a_line_is_waited_for(run, tmp_path):
    log = run / "generator" / "metrics.jsonl"
    log.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    (stage,) = watch.read(run)
    assert stage.curves == {"loss": {1: 2.0}}
    log.write_text('{"step": 1, "lo\n{"step": 2, "loss": 1.0}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1 is no JSON"):
        watch.read(run)
    log.write_text('{"step": "one", "loss": 1.0}\n')
    with pytest.raises(ValueError, match="line 1: step is 'one'; it must be a whole number"):
        watch.read(run)
    with pytest.raises(ValueError, match=r"holds no metrics\.jsonl of a training"):
        watch.read(tmp_path)
    with pytest.raises(SystemExit, match=r"--every is -1\.0; it must be"):
        watch.main([str(run), "--every", "-1"])


def test_long_curves_keep_their_last_point():
    thin = watch._thinned({step: float(step) for step in range(1, 100_001)})
    assert len(thin) <= watch.POINTS
    assert thin[-1] == (100_000, 100_000.0)


def test_figures_are_told_beside_the_folder_too(tmp_path, monkeypatch):
    told, made = [], []
    run = types.SimpleNamespace(
        log=told.append, define_metric=lambda *name, **how: None, finish=lambda: told.append("end")
    )  # fmt: skip
    stand_in = types.ModuleType("wandb")
    stand_in.__spec__ = types.SimpleNamespace(name="wandb")
    stand_in.init, stand_in.Image = lambda **how: made.append(how) or run, np.shape
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    for first in (0, 2):
        log = Log(tmp_path / "generator", "generator", first, 4, beside=wandb.opener("mine", {"seed": 3}))
        log.metrics(first + 1, {"loss": 2.5, "grad_norm": float("nan")})
        log.picture(first + 1, np.zeros((2, 4, 4, 1), np.uint8), 2)
        log.say("warning: something")
        log.close()
    assert told[:3] == [{"loss": 2.5, "update": 1}, {"samples": (8, 14, 3), "update": 1}, "end"]
    assert (made[0]["name"], made[0]["group"], made[0]["config"]) == ("mine/generator", "mine", {"seed": 3})
    assert made[0]["id"] == made[1]["id"], "a resumed training goes on in the same place"
    (stage,) = watch.read(tmp_path)
    assert stage.warnings[-2:] == ["warning: something"] * 2
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(wandb.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="log is wandb, but the package is not installed: pip install wandb"):
        wandb.opener("mine", {})
