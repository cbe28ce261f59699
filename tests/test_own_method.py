"""The whole way of a method that lies outside ar_jax, in a file beside the user's config: the toy of `tests/own`.

It trains, resumes, draws, evaluates, tokenizes and plans. Each command is called as in a process of its own: what another
one imported and trusted is forgotten.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from evals.tiny import tiny_network
from test_train_sample import quick  # noqa: F401  one device

from ar_jax import evaluate, plan, sample, tokenize
from ar_jax.config import load_config
from ar_jax.files import trust
from ar_jax.files.models import open_model
from ar_jax.machine.sharding import MeshShape, make_mesh
from ar_jax.train import __main__ as train

TOY = Path(__file__).parent / "own"
PARTS = {  # place in run.json's experiment -> the name that is written there
    ("tokenizer", "module", "type"): "my_method:Bounded",
    ("generator", "module", "type"): "my_method:FrontLoaded",
    ("generator", "module", "head", "type"): "my_method:Smoothed",
    ("generator", "order", "function"): "my_method:backwards",
    ("generator", "sampling", "guidance", "type"): "my_method:Late",
    ("generator", "sampling", "decoder", "type"): "my_method:Twice",
}
TINY = (
    "--data.size 16 --tokenizer.module.size 16 16 --tokenizer.module.mult 1 1 --tokenizer.module.features 4 "
    "--tokenizer.module.res-blocks 0 --tokenizer.module.latent 4 "
    "--tokenizer.module.codes 16 --tokenizer.module.code-features 4 --tokenizer.module.groups 2 --tokenizer.batch 8 "
    "--generator.module.backbone.layers 1 --generator.module.backbone.width 16 --generator.module.backbone.heads 2 "
    "--generator.module.backbone.hidden 24 --generator.module.conditioning.width 16 --generator.batch 8 "
    "--tokenizer.preview-every 0 --generator.preview-every 0 --generator.steps 2 --tokenizer.steps 1"
)


@pytest.fixture
def another_process(monkeypatch):
    """Forgets, when called, all that this process knows of the toy."""
    path, beside = list(sys.path), str(TOY)

    def forget():
        sys.modules.pop("my_method", None)
        monkeypatch.setattr(trust, "_trusted", set())
        monkeypatch.setattr(sys, "path", [place for place in path if place != beside])

    monkeypatch.delenv(trust.VARIABLE, raising=False)
    forget()
    yield forget
    sys.modules.pop("my_method", None)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    pytest.importorskip("mlxtend")
    folder = tmp_path_factory.mktemp("own")
    for file in TOY.glob("my_*.py"):
        shutil.copy(file, folder)
    return folder


def trained(place, *overrides):
    train.main([str(place / "my_config.py"), "--out", str(place), *TINY.split(), *map(str, overrides)])


@pytest.fixture
def run(place, another_process):
    """The run folder; the first test that asks for it trains it."""
    if not (place / "mine").exists():
        trained(place)
        another_process()
    return place / "mine"


def refused(command, *arguments):
    with pytest.raises(SystemExit) as caught:
        command([str(argument) for argument in arguments])
    return str(caught.value.code)


def test_it_trains_and_its_parts_are_named(run):
    experiment = json.loads((run / "run.json").read_text())["experiment"]
    for keys, name in PARTS.items():
        found = experiment
        for key in keys:
            found = found[key]
        assert found == name
    assert json.loads((run / "generator" / "model.json").read_text())["code"] == {
        "my_method": str((run.parent / "my_method.py").resolve())
    }


def test_it_resumes_without_being_trusted(run, place, another_process, tmp_path):
    shutil.copytree(run, tmp_path / "mine")
    trained(place, "--out", tmp_path, "--generator.steps", 3)
    assert "my_method" in sys.modules
    steps = [path.name for path in (tmp_path / "mine" / "generator" / "checkpoints").iterdir()]
    assert sorted(steps)[-1] == "3"


def test_it_is_drawn_from_by_those_who_trust_it(run, another_process, tmp_path, capsys):
    count = ["--count", 2, "--batch", 2, "--labels", 3, "--unroll", False]
    out = ["--out", tmp_path / "a.npz"]
    said = refused(sample.main, run, *count, *out)
    assert "'my_method:FrontLoaded' lies outside ar_jax" in said
    assert "my_method" not in sys.modules
    assert not list(tmp_path.iterdir()), "nothing is written before all is checked"
    (given,) = re.findall(r"give (--trust \S+) or set AR_JAX_TRUST=\S+$", said)
    sample.main([str(word) for word in (run, *count, *out, *given.split())])
    assert np.load(tmp_path / "a.npz")["arr_0"].shape == (2, 16, 16, 3)
    assert "calls an image: 128 of the generator" in capsys.readouterr().out  # Twice: 64 tokens, drawn twice


def test_the_name_of_the_module_is_enough_where_it_can_be_imported(run, another_process, monkeypatch):
    said = refused(tokenize.main, run, "--trust", "my_method", "--out", run / "never")
    assert re.search(
        r"'my_method:Bounded' needs the module my_method, but it cannot be found here; give its path", said
    )
    another_process()
    monkeypatch.syspath_prepend(run.parent)
    assert "give --trust my_method or set" in refused(tokenize.main, run, "--out", run / "never")
    monkeypatch.setenv(trust.VARIABLE, "my_method")
    assert type(open_model(run, "tokenizer").module).__name__ == "Bounded"


def test_it_is_evaluated(run, another_process, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate.Judge, "open", lambda judge: tiny_network())
    command = ["generation", run, "--reference", "data", "--count", 20, "--reference-count", 20, "--metrics", "fd",
               "--batch", 24, "--sampler.batch", 24, "--sampler.unroll", False, "--no-report", "--out", tmp_path / "e.json"]  # fmt: skip
    assert "give --trust" in refused(evaluate.main, *command)
    evaluate.main([str(word) for word in (*command, "--trust", run.parent / "my_method.py")])
    assert json.loads((tmp_path / "e.json").read_text())["figures"]["FD-Tiny"] > 0


def test_it_is_planned(place, another_process):
    experiment = plan.parse(load_config(str(place / "my_config.py")), [*TINY.split()], "plan", "")
    options = plan.Options(config="my_config.py", topology=("none",), images=2)
    compiled = plan.compile_for(experiment, options, make_mesh(MeshShape(data=1), jax.devices()[:1]))
    assert compiled.images == 8
    assert compiled.facts["parameters"]


def test_every_command_says_what_trust_is(capsys):
    for main, arguments in ((sample.main, []), (plan.main, []), (tokenize.main, [])):
        with pytest.raises(SystemExit):
            main([*arguments, "--help"])
        assert trust.HELP in capsys.readouterr().out


def test_what_readme_shows_is_the_toy():
    readme = (TOY.parents[1] / "README.md").read_text()
    section = readme.partition("## Add a method")[2].partition("\n## ")[0]
    (shown,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    toy = "\n".join(file.read_text() for file in TOY.glob("my_*.py"))
    lines = [line for line in shown.splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) > 8
    for line in lines:
        assert line in toy, line
