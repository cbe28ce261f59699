import functools
import json
import types

import pytest

from ar_jax.train import log


class Chip:
    """What the log reads of a device: 12 GiB of memory, half of it in use."""

    device_kind = "TPU v5 lite"

    def __init__(self, used):
        self.used = used

    def memory_stats(self):
        return {"bytes_in_use": self.used * 2**30, "peak_bytes_in_use": 7 * 2**30}


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    now = [100.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def opened(tmp_path, clock):
    opened = log.Log(tmp_path, "stage", first=10, steps=100, chips=4)
    yield opened
    opened.close()


def spend(opened, clock, on, seconds):
    with opened.spending(on):
        clock[0] += seconds


def test_pace_counts_neither_previews_nor_saves_and_starts_anew_every_time(opened, clock, monkeypatch):
    monkeypatch.setattr(log.jax, "local_devices", lambda: [Chip(3), Chip(5)])
    opened.flops = 197e12 * 4
    clock[0] += 6
    spend(opened, clock, "input", 1)
    spend(opened, clock, "input", 1)
    spend(opened, clock, "aside", 50)
    assert opened.pace(step=14, batch=32) == pytest.approx(
        {
            "steps_per_second": 0.5, "seconds_per_step": 2, "images_per_second": 16, "images_per_second_per_chip": 4,
            "input_wait": 0.25, "teraflops_per_chip": 197 / 2, "mfu": 0.5, "memory_gib": 5, "memory_peak_gib": 7,
        }
    )  # fmt: skip
    clock[0] += 1
    figures = opened.pace(step=15, batch=32)
    assert (figures["steps_per_second"], figures["input_wait"]) == (1, 0)


def test_without_known_limits_neither_memory_nor_mfu_is_told(tmp_path, clock):
    opened = log.Log(tmp_path, "stage", first=10, steps=100)
    clock[0] += 1
    figures = opened.pace(step=11, batch=1)
    assert not {"mfu", "memory_gib", "memory_peak_gib"} & figures.keys()
    opened.close()


def test_lines_are_json_and_other_processes_write_nothing(opened, tmp_path, clock):
    opened.metrics(11, {"loss": 1.23456789})
    opened.metrics(12, {"spike/loss": 3.0, "lr": 4e-7, "grad_norm": float("nan")})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    strictly = functools.partial(json.loads, parse_constant=pytest.fail)  # NaN is no JSON
    assert list(map(strictly, lines)) == [
        {"step": 11, "loss": 1.23457}, {"step": 12, "spike/loss": 3.0, "lr": 4e-7, "grad_norm": None},
    ]  # fmt: skip
    other = log.Log(tmp_path / "other", "stage", first=0, steps=1, chips=1, quiet=True)
    other.metrics(1, {"loss": 1.0})
    clock[0] += 1
    assert other.pace(1, 1)["steps_per_second"] == 1
    other.close()
    assert not (tmp_path / "other").exists()


def test_a_resumed_log_says_nothing_twice(tmp_path):
    log.Log(tmp_path, "stage", first=0, steps=4).metrics(1, {"loss": 1.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "loss": 2.0}\n{"step": 2, "held_out/loss": 2.5}\n{"step": 3, "loss": 3.0}\n{"step": 4, "lo')
    log.Log(tmp_path, "stage", first=2, steps=4).metrics(3, {"loss": 3.5})
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert found == [
        {"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 2, "held_out/loss": 2.5}, {"step": 3, "loss": 3.5},
    ]  # fmt: skip


def test_an_accelerator_whose_figures_are_not_known_is_named(tmp_path, capsys, monkeypatch):
    for platform in ("cpu", "gpu"):
        device = types.SimpleNamespace(platform=platform, device_kind="New Chip")
        monkeypatch.setattr(log.jax, "local_devices", lambda device=device: [device])
        log.Log(tmp_path / platform, "stage", first=10, steps=100)
        said = capsys.readouterr()
        named = "stage: no figures of New Chip in ar_jax/machine/chips.py, so mfu is not logged" in said.out + said.err
        assert named == (platform == "gpu")
