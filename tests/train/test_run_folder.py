"""What a run's folder says and refuses: who works in it, what was changed, which tokenizer its generator knows."""

import json
import subprocess
import sys

import pytest

from ar_jax.config import load_config, parse
from ar_jax.machine.claim import claim
from ar_jax.machine.seeds import narrow
from ar_jax.train.history import note


def test_a_folder_is_of_one_run_at_a_time(tmp_path):
    with claim(tmp_path / "run"):
        with pytest.raises(ValueError, match=r"run is in use by process \d+ on .* since \d{4}-.*stop that one first"):  # noqa: SIM117
            with claim(tmp_path / "run"):
                pass
        (tmp_path / "run" / "kept").touch()
    with claim(tmp_path / "run"):
        pass
    with claim(tmp_path / "failed"):
        pass
    assert not (tmp_path / "failed").exists(), "nothing was written in it"


def test_the_claim_of_a_killed_process_is_taken_over(tmp_path):
    holds = "import os, sys, pathlib; from ar_jax.machine.claim import claim\nwith claim(pathlib.Path(sys.argv[1])): os._exit(9)"
    assert subprocess.run([sys.executable, "-c", holds, str(tmp_path / "run")], check=False).returncode == 9
    assert "process" in (tmp_path / "run" / ".claim").read_text()
    with claim(tmp_path / "run"):
        pass


def test_changes_are_noted_with_the_updates_they_came_after(tmp_path):
    def facts(**optim):
        return {"config": "x", "overrides": [], "experiment": {"seed": 1, "optim": {"lr": 0.1} | optim}}

    file, none = tmp_path / "run.json", {"tokenizer": 0, "generator": 0}
    assert note(file, facts(), none, True) == []
    assert note(file, facts(), {"tokenizer": 4, "generator": 0}, True) == []
    said = note(file, facts(lr=0.2, clip=1.0), {"tokenizer": 4, "generator": 3}, True)
    assert said == [
        "optim.lr is 0.2, was 0.1 until update tokenizer 4, generator 3",
        "optim.clip is 1.0, was None until update tokenizer 4, generator 3",
    ]
    written = json.loads(file.read_text())
    assert written["experiment"]["optim"] == {"lr": 0.2, "clip": 1.0}
    (change,) = written["changes"]
    assert change == {
        "updates_done": {"tokenizer": 4, "generator": 3},
        "was": {"optim.lr": 0.1, "optim.clip": None},
        "now": {"optim.lr": 0.2, "optim.clip": 1.0},
    }
    (said,) = note(file, facts(lr=0.3, clip=1.0), {"tokenizer": 4, "generator": 6}, False)
    assert said.startswith("everything is trained; not used: optim.lr is 0.3")
    assert json.loads(file.read_text()) == written


def test_seeds_are_narrowed_where_32_bits_are_taken():
    assert narrow(7) == 7
    assert len({narrow(seed) for seed in (0, 2**32, 2**33)}) == 3


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("generator.optim.lr", "-1", "-1.0; it must be a number from 0 to inf"),
        ("generator.optim.lr", "nan", "nan; it must be a number from 0 to inf"),
        ("generator.drop", "2", "2.0; it must be a number from 0 to 1"),
        ("generator.optim.ema", "1.5", "1.5; it must be a number from 0 to 1"),
        ("tokenizer.steps", "-5", "-5; it must be a whole number from 0 to 16777216"),
        ("tokenizer.losses.lpips", "-1", "-1.0; it must be a number from 0 to 16777216"),
        ("generator.module.backbone.layers", "0", "0; it must be a whole number from 1 to 1024"),
        ("mesh.fsdp", "-2", "-2; it must be a whole number from -1 to 16777216"),
        ("seed", "-1", "-1; it must be a whole number from 0 to 18446744073709551615"),
    ],
)
def test_numbers_of_settings_have_their_range(option, value, said):
    with pytest.raises(ValueError, match="it must be a") as error:
        parse(load_config("configs/llamagen.py:mnist5k"), [f"--{option}", value], "train.py", "")
    assert str(error.value) == f"{option} is {said}"
