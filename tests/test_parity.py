"""Numeric parity with the published models, from the fixtures at `AR_JAX_PARITY`."""

import functools
import json
import os
import pathlib

import jax
import numpy as np
import parity_continuous
import parity_flow
import parity_llamagen
import parity_next_scale
import parity_next_scale_generators
import parity_small
import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.usefixtures("quick_compile")

ROOT = pathlib.Path(os.environ.get("AR_JAX_PARITY", pathlib.Path(__file__).parents[2] / "shared" / "parity"))
MODULES = (
    parity_continuous, parity_flow, parity_llamagen, parity_next_scale, parity_next_scale_generators, parity_small,
)  # fmt: skip
CASES = {folder: compute for module in MODULES for folder, compute in module.CASES.items()}


def _outputs():
    """(folder, case, outputs) of every case; one entry per folder where the fixtures are absent."""
    for folder in CASES:
        meta = ROOT / folder / "meta.json"
        if not meta.exists():
            yield pytest.param(folder, "absent", [], id=f"{folder}/absent")
            continue
        for i, case in enumerate(json.loads(meta.read_text())["cases"]):
            if set(case["outputs"]) <= parity_next_scale_generators.LATER:
                continue
            yield pytest.param(
                folder, case["function"], case["outputs"], id=f"{folder}/{i}-{'+'.join(case['outputs'])}"
            )


@functools.cache
def _computed(folder):
    path = ROOT / folder
    meta = json.loads((path / "meta.json").read_text()) | {"folder": path}
    weights = {}
    for entry in meta["weights"]:
        weights |= load_file(path / entry["file"])
    io = load_file(path / "io.safetensors")
    inputs = {name: io[name] for name, array in meta["arrays"].items() if array["role"] == "input"}
    with jax.default_matmul_precision("highest"):
        return meta, io, CASES[folder](meta, weights, inputs)


@pytest.mark.parametrize(("folder", "function", "outputs"), list(_outputs()))
def test_parity(folder, function, outputs):
    if not (ROOT / folder / "meta.json").exists():
        pytest.skip(f"no fixture at {ROOT / folder}; set AR_JAX_PARITY to the folder that holds the parity fixtures")
    meta, want, got = _computed(folder)
    for name in outputs:
        _compare(f"{folder}/{name} ({function})", np.asarray(got[name]), want[name], meta["arrays"][name])


def _compare(name, got, want, array):
    assert got.size == want.size, f"{name}: shape {got.shape} against {want.shape}"
    got = got.reshape(want.shape)
    if want.dtype.kind in "iub":
        np.testing.assert_array_equal(got.astype(want.dtype), want, err_msg=name)
        return
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite], err_msg=f"{name}: infinities")
    np.testing.assert_allclose(
        got[finite], want[finite], rtol=0, atol=array["max_abs_tolerance"], err_msg=name, equal_nan=False
    )


def test_every_fixture_of_the_supported_methods_has_a_case():
    if not ROOT.exists():
        pytest.skip(f"no fixtures at {ROOT}; set AR_JAX_PARITY")
    supported = (
        *("llamagen", "lpips", "patchgan", "var", "flexvar", "hmar", "training_schedules"),
        *("kl16", "mar", "disa_mar", "givt", "flowar", "xar"),
    )
    present = {path.name for path in ROOT.iterdir() if path.name.startswith(supported)}
    assert present <= CASES.keys()
