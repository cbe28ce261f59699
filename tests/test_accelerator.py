"""The script for accelerators, on a CPU with tiny sizes."""

import json

import accelerator


def test_tiny_measurements_are_written_and_a_failure_costs_nothing_else(tmp_path, capsys):
    accelerator.main(["--tiny", "--out", str(tmp_path), "--parts", "speed", "--dtype", "float32", "--repeat", "2"])
    entries = {entry["name"]: entry for entry in json.loads((tmp_path / "results.json").read_text())}
    assert "FileNotFoundError" in entries["absent"]["error"] or "ValueError" in entries["absent"]["error"]
    for name in ("tiny, train, batch 2", "tiny, sample, batch 1"):
        figures = entries[name]
        assert 0 < figures["of_peak"] < 1, name
        assert figures["images_per_second"] > 0
        assert figures["program_gb"] > 0
        assert figures["mfu"] == "no figures of cpu in ar_jax/machine/chips.py"
    table = (tmp_path / "table.md").read_text()
    assert "| tiny, sample, batch 1 |" in table
    assert table in capsys.readouterr().out


def test_an_error_is_an_entry_and_nothing_begins_after_the_end(tmp_path):
    report = accelerator.Report(tmp_path / "checks.json", budget=1000)
    report.attempt("checks", "held", lambda: {"holds": True})
    report.attempt("checks", "broken", lambda: 1 / 0)
    report.budget = 0
    report.attempt("checks", "late", lambda: {"holds": True})
    held, broken, late = json.loads((tmp_path / "checks.json").read_text())
    assert held["holds"] is True
    assert broken["error"].startswith("ZeroDivisionError")
    assert late["skipped"] == "no time left"


def test_checks_find_their_cases():
    names = [name for name, _ in accelerator.laws()]
    assert len(names) == len(set(names)) == 4


def test_every_job_is_of_a_known_model_and_none_comes_twice():
    every = [job for jobs in accelerator.ROUNDS for job in jobs]
    assert {job.model for job in every} == accelerator.MODELS.keys()
    assert len(set(every)) == len(every)
    for config, overrides in accelerator.MODELS.values():
        accelerator.parse(accelerator.load_config(str(accelerator.ROOT / config)), list(overrides), "test", "")
