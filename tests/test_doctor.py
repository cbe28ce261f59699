"""The doctor: what is right is said to be right, and each problem comes with the line that mends it."""

import collections
import importlib.metadata
from pathlib import Path

import hosts
import jax
import pytest

from ar_jax import doctor
from ar_jax.files import cache
from ar_jax.machine import checks


def examined(capsys, *arguments):
    """Exit code and what was printed."""
    with pytest.raises(SystemExit) as ended:
        doctor.main([str(argument) for argument in arguments])
    return ended.value.code, capsys.readouterr().out


def test_a_machine_that_is_right(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("AR_JAX_INCEPTION", raising=False)
    code, said = examined(capsys, "--folder", tmp_path / "runs")
    assert code == 0, said
    assert f"jax {jax.__version__}, jaxlib" in said
    assert "devices: 8 of cpu, 8 of them here" in said
    assert "a small program on all devices: compiled in" in said
    assert "GiB free at" in said
    assert "\nabsent   InceptionV3, without which no figure is called FID\n         -> export AR_JAX_INCEPTION=" in said
    assert said.endswith("\nno problems\n")
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_problems_of_the_machine_and_what_mends_them(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("AR_JAX_INCEPTION", str(tmp_path / "gone.pth"))
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda place: collections.namedtuple("Usage", "free")(10**9))
    monkeypatch.setattr(checks, "find_font", lambda path: Path(path) / Path("/").iterdir)  # a check that breaks
    code, said = examined(capsys, "--folder", tmp_path / "runs")
    assert code == 1
    assert (
        f"problem  {tmp_path}/file/cache/captions cannot be written: captions are encoded anew at every start" in said
    )
    assert f"-> export {cache.VARIABLE}=FOLDER" in said
    assert "gone.pth, which is no file\n         -> unset AR_JAX_INCEPTION" in said
    assert "problem  disk: 0.9 GiB free" in said
    assert "problem  weights: TypeError" in said
    assert said.endswith("\n5 problems\n")


def test_a_gpu_that_jax_does_not_use(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setattr(checks.glob, "glob", lambda nodes: [nodes] if "nvidia" in nodes else [])
    (found,) = (one for one in checks.devices(Path()) if one.state == "problem")
    assert found.what == "this machine has a GPU, but JAX uses the cpu"
    assert found.mend == "pip install -U 'ar_jax[cuda]'"
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    (found,) = (one for one in checks.devices(Path()) if one.state == "problem")
    assert found.mend == "unset JAX_PLATFORMS"


def test_packages_that_are_missing_or_old(capsys, monkeypatch):
    monkeypatch.setattr(
        importlib.metadata, "requires",
        lambda name: ["jax[cuda]>=99.1", "no-such-package>=2", "pillow>=11", "tqdm>=4", 'no-such-demo>=6; extra == "demo"'],
    )  # fmt: skip
    code, said = examined(capsys)
    assert code == "doctor: 1 problem; the rest is looked at once packages are right"
    assert f"problem  packages: jax is {jax.__version__}, older than 99.1; no-such-package is missing" in said
    assert "-> pip install 'jax[cuda]>=99.1' 'no-such-package>=2'" in said
    assert "absent   extra demo: no-such-demo is missing\n         -> pip install 'no-such-demo>=6'" in said


def test_hosts_that_see_each_other_and_one_folder(tmp_path):
    first, second = hosts.run(["-m", "ar_jax.doctor", "--folder", tmp_path])
    assert "2 processes see each other and have the same versions" in first
    assert f"{tmp_path} is one folder for all of them" in first
    assert "devices: 2 of cpu, 1 of them here" in first
    assert first.endswith("\nno problems\n")
    assert "devices" not in second, "the other one says its problems only"
