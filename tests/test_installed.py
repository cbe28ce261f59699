"""The package where it is installed without a clone: its command, the published configs, configs of one's own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ar_jax.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
OWN = """
import dataclasses
import llamagen
def get_config():
    return dataclasses.replace(llamagen.mnist5k(), name="from_elsewhere")
"""
# several command lines in one process, as it is starting JAX that takes time
LINES = """
import contextlib, io, json, sys
from ar_jax.__main__ import main
results = []
for line in sys.argv[1:]:
    sys.argv, code = ["ar-jax", *line.split()], 0
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    results.append([code, out.getvalue()])
print(json.dumps([sys.modules["ar_jax"].__file__, results]))
"""


def python_files(folder):
    return {str(file.relative_to(folder)) for file in folder.rglob("*.py")}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that pip installed the package in, from a copy of the sources."""
    root = tmp_path_factory.mktemp("installed")
    for name in ("ar_jax", "configs"):
        shutil.copytree(ROOT / name, root / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root / "source")
    offline = ("--no-deps", "--no-index", "--no-build-isolation", "--no-compile", "--disable-pip-version-check")
    pip = (sys.executable, "-m", "pip", "install", "-q", *offline, "--target", root / "site", root / "source")
    done = subprocess.run(list(map(str, pip)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return root / "site"


def run(installed, command, place):
    env = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run(list(map(str, command)), cwd=place, env=env, capture_output=True, text=True)


def test_everything_is_installed(installed):
    published = {f"configs/{name}" for name in python_files(ROOT / "configs")}
    assert published
    assert python_files(installed / "ar_jax") == python_files(ROOT / "ar_jax") | published


def test_the_command_lists_what_it_can_do(installed, tmp_path):
    said = run(installed, [installed / "bin" / "ar-jax"], tmp_path)
    assert said.returncode == 0, said.stderr
    assert all(f"    {name} " in said.stdout for name in COMMANDS)
    said = run(installed, [installed / "bin" / "ar-jax", "trian"], tmp_path)
    assert said.returncode == 1
    assert said.stderr == f"ar-jax: there is no command 'trian'; there are {', '.join(COMMANDS)}\n"


def test_commands_and_configs_work_from_elsewhere(installed, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    helps = [f"{name} --help" for name in COMMANDS]
    lines = ["train own.py --help", *helps, "train llamagen", "bench train configs/var_d16.py", "plan own.py"]
    done = run(installed, [sys.executable, "-c", LINES, *lines], tmp_path)
    assert done.returncode == 0, done.stderr
    where, results = json.loads(done.stdout)
    assert Path(where) == installed / "ar_jax" / "__init__.py"
    assert [code for code, _ in results[:-3]] == [0] * (1 + len(helps)), "help is no error"
    assert all(text.strip() for _, text in results[:-3])
    assert "--generator.optim.lr" in results[0][1]
    assert "from_elsewhere" in results[0][1]
    family, old, own = [code for code, _ in results[-3:]]
    assert family.startswith("train.py: llamagen has variants: mnist5k, fashion_mnist, ")
    assert "LlamaGen: next-token prediction" in family
    assert old == "ar_jax.bench: configs/var_d16.py is a variant now: give configs/var.py:d16"
    assert "give at least one --topology" in own, "the config was found, which is all that is asked here"
