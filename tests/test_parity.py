"""Numeric parity with the published models, from the fixtures at `AR_JAX_PARITY`.

Every file of tests/parity computes some folders of them (see `parity.common`).
"""

import functools
import importlib
import os
import pathlib

import jax
import numpy as np
import pytest
from parity.common import Folder

ROOT = pathlib.Path(os.environ.get("AR_JAX_PARITY", pathlib.Path(__file__).parents[2] / "shared" / "parity"))
FILES = sorted(pathlib.Path(__file__).with_name("parity").glob("*.py"))
MODULES = [importlib.import_module(f"parity.{path.stem}") for path in FILES]
CASES = {folder: compute for module in MODULES for folder, compute in getattr(module, "CASES", {}).items()}


def _present(folder):
    return (ROOT / folder / "meta.json").exists()


def _outputs():
    """(folder, case) of every case; one entry per folder where the fixtures are absent."""
    for folder in CASES:
        if not _present(folder):
            yield pytest.param(folder, None, id=f"{folder}/absent")
            continue
        for case in Folder(ROOT / folder).cases:
            yield pytest.param(folder, case, id=f"{folder}/{case.number}-{'+'.join(case.outputs)}")


@functools.cache
def _computed(name):
    if not _present(name):
        pytest.skip(f"no fixture at {ROOT / name}; set AR_JAX_PARITY to the folder that holds the parity fixtures")
    folder = Folder(ROOT / name)
    with jax.default_matmul_precision("highest"):
        return folder, CASES[name](folder)


@pytest.mark.parametrize(("name", "case"), list(_outputs()))
def test_parity(name, case):
    folder, got = _computed(name)
    for output in case.outputs:
        where = f"{name}/{output} ({case.function})"
        _compare(where, np.asarray(got[output]), folder.want[output], folder.arrays[output]["max_abs_tolerance"])


def _compare(name, got, want, tolerance):
    assert got.size == want.size, f"{name}: shape {got.shape} against {want.shape}"
    got = got.reshape(want.shape)
    if want.dtype.kind in "iub":
        np.testing.assert_array_equal(got.astype(want.dtype), want, err_msg=name)
        return
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite], err_msg=f"{name}: infinities")
    np.testing.assert_allclose(got[finite], want[finite], rtol=0, atol=tolerance, err_msg=name, equal_nan=False)


@pytest.mark.parametrize("name", CASES)
def test_every_entry_of_a_folder_is_read(name):
    folder, _ = _computed(name)
    assert not folder.unread()


def test_an_entry_that_nobody_read_is_named():
    folder = next((name for name in CASES if _present(name)), None)
    if folder is None:
        pytest.skip(f"no fixtures at {ROOT}; set AR_JAX_PARITY")
    fresh = Folder(ROOT / folder)
    key = next(iter(fresh.weights))
    assert f"key {key} of weights.safetensors" in fresh.unread()
    _ = fresh.weights[key]
    assert f"key {key} of weights.safetensors" not in fresh.unread()


BUILT = {
    *("llamagen_vq", "llamagen_gpt_c2i", "llamagen_gpt_t2i", "lpips", "patchgan", "training_schedules"),
    *("var_vqvae", "var", "var_shared_adaln", "flexvar_vq", "flexvar", "hmar"),
    *("kl16_vae", "mar", "disa_mar", "himar", "givt_ar", "givt_masked", "givt_vae", "flowar", "flowar_cross", "xar"),
    *("rar", "maskgit_vqgan", "nar_c2i", "flashar", "lightgen"),
    *("vq_diffusion_rules", "vq_diffusion", "vq_diffusion_class", "vq_ddm", "fhs_rules", "halton_maskgit"),
    *("maskgit_vit", "maskgit_uvit", "token_search", "halton_order", "meissonic", "meissonic_plain", "semaim"),
    *("openmagvit2_vq", "openmagvit2_ar", "ibq_vq", "ibq_ar"),
    *("infinity_bsq_vae", "tokenbridge", "binary_latent", "elm_bae", "elm_gpt"),
    *("fqgan_dual_vq", "fqgan_triple_vq", "fqgan_dual_far", "fqgan_triple_far"),
    *("vqgan_lc", "tokenflow_vq", "robusttok_perturbation"),
    *("jpeg_lm_codec", "vitok_ae"),
    *("flextok", "dar_tokenizer", "dar_gpt", "detailflow_tokenizer", "detailflow_gpt"),
    *("gigatok_vq", "gigatok_gpt", "hita_vq", "hita_gpt"),
    *("dqvae", "dq_transformer"),
    *("instella_bae", "instella_ar", "instella_diff"),
    *("titok_vq", "titok_vq_nonlegacy", "titok_vae", "titok_discriminator"),
    *("tatitok_vq", "tatitok_vae"),
    *("fractalar", "fractalmar"),
}


def test_no_method_has_lost_its_folders():
    assert CASES.keys() >= BUILT
