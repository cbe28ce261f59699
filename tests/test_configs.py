"""Every config builds, parses, and has the published number of parameters."""

import json
import math
import os
import pathlib

import jax
import pytest

from ar_jax.config import Experiment, load_config, parse
from ar_jax.convert.sources import export
from ar_jax.data import Info
from ar_jax.tokens import TokenSpec, grid

ROOT = pathlib.Path(os.environ.get("AR_JAX_PARITY", pathlib.Path(__file__).parents[2] / "shared" / "parity"))
CONFIGS = sorted(path for path in (pathlib.Path(__file__).parents[1] / "configs").glob("*.py") if path.name[0] != "_")
IMAGENET = Info(classes=1000, captions=True, text="flan-t5-xl", text_rows=120, text_width=2048)
PUBLISHED = {  # config -> manifest; the size of the image does not change the network
    "llamagen_vq16": "vq_ds16_c2i",
    "llamagen_vq8": "vq_ds8_c2i",
    "var_vq": "vae_ch160v4096z32",
    "flexvar_vq": "FlexVAE",
    "mar_kl16": "kl16",
    **{f"mar_{size}_256": f"MAR-{size.upper()}" for size in "blh"},
    **{f"var_d{depth}": f"var_d{depth}" for depth in (16, 20, 24, 30, 36)},
    "flexvar_d16": "FlexVARd16-epo179",
    "flexvar_d20": "FlexVARd20-epo249",
    "flexvar_d24": "FlexVARd24-epo349",
    **{f"hmar_d{depth}{part}": f"hmar-d{depth}" for depth in (16, 20, 24, 30) for part in ("", "_masks")},
    **{f"flowar_{size}_256": f"FlowAR-{size.upper()}" for size in "slh"},
    **{f"xar_{size}_256": f"xAR-{size.upper()}" for size in "blh"},
    "llamagen_xl_t2i_256": "t2i_XL_stage1_256",
    "llamagen_xl_t2i_512": "t2i_XL_stage2_512",
    **{
        f"llamagen_{size}_{side}": f"c2i_{size.upper()}_384"
        for size in ("b", "l", "xl", "xxl", "3b")
        for side in (256, 384)
    },
}

each = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def networks(experiment):
    """The networks a config trains, complete for images of its size."""
    tokenizer, generator = experiment.tokenizer.module, experiment.generator.module
    if tokenizer is None:  # converted from a release: VQ-16
        side = experiment.data.size // 16
        spec = TokenSpec(grid(side, side), codes=(16384,))
    else:
        spec = tokenizer.spec
        if not experiment.tokenizer.path:
            yield "tokenizer", tokenizer
    if generator is not None:
        yield "generator", generator.complete(spec, IMAGENET)


@each
def test_config_builds(path):
    experiment = load_config(str(path))
    assert isinstance(experiment, Experiment)
    assert experiment.name == path.stem
    found = dict(networks(experiment))
    assert found
    for module in found.values():
        shapes = jax.eval_shape(module.init_params, jax.random.key(0))
        assert all(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    if "tokenizer" in found:
        assert found["tokenizer"].size == (experiment.data.size,) * 2


@each
def test_config_has_the_published_size(path):
    manifest = ROOT / "manifests" / f"{PUBLISHED.get(path.stem)}.json"
    if path.stem not in PUBLISHED or not manifest.exists():
        pytest.skip(
            "no published size" if path.stem not in PUBLISHED else f"no manifest at {manifest}; set AR_JAX_PARITY"
        )
    content = json.loads(manifest.read_text())
    ((kind, module),) = networks(load_config(str(path)))
    found = export(module, kind)
    assert {**found.keys, **found.buffers} == {key: tuple(shape) for key, shape in content["keys"].items()}
    assert found.trained == content["num_params"]


@each
def test_config_says_how_it_is_run(path):
    assert f"python train.py configs/{path.name}" in path.read_text().split('"""')[1]


@each
def test_overrides_are_parsed(path, capsys):
    experiment = load_config(str(path))
    changed = parse(experiment, ["--generator.batch", "8", "--data.size", "64"], "train.py", "")
    assert (changed.generator.batch, changed.data.size) == (8, 64)
    assert changed.tokenizer == experiment.tokenizer
    with pytest.raises(SystemExit) as stop:
        parse(experiment, ["--help"], "train.py", "")
    assert stop.value.code == 0
    assert "--generator.optim.lr" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parse(experiment, ["--generator.bach", "8"], "train.py", "")
    assert "--generator.batch" in capsys.readouterr().err


def test_every_published_config_is_there():
    assert PUBLISHED.keys() <= {path.stem for path in CONFIGS}
