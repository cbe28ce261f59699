"""Model folders as version 66b0281 wrote them, one of each kind of model: they open as the same networks."""

import hashlib
import json
from pathlib import Path

import jax
import pytest

from ar_jax.convert.sources import param_shapes
from ar_jax.options import Sampler, options_of
from ar_jax.sampler import open_drawer

OLD = sorted((Path(__file__).parent / "old").glob("*.json"))


@pytest.mark.parametrize("file", OLD, ids=lambda file: file.stem)
def test_a_folder_of_an_earlier_version_holds_the_same_model(file, tmp_path):
    content = json.loads(file.read_text())
    for kind in ("tokenizer", "generator"):
        (tmp_path / kind / "params").mkdir(parents=True)  # looked for, not read
        (tmp_path / kind / "model.json").write_text(json.dumps(content[kind]))
    drawer = open_drawer(str(tmp_path), Sampler())
    for kind, model in (("tokenizer", drawer.tokenizer), ("generator", drawer.model)):
        shapes = param_shapes(model.module)
        paths = jax.tree_util.tree_leaves_with_path(shapes)
        lines = sorted(jax.tree_util.keystr(path, simple=True, separator="/") + str(x.shape) for path, x in paths)
        assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == content[f"{kind}_parameters"]
    old = content["generator"]["settings"]["sampling"]
    assert drawer.sampling.guidance.weight == old["guidance"]
    assert drawer.sampling.temperature.value == old["temperature"]
    assert drawer.sampling.filter.top_k == old["top_k"]
    assert dict(drawer.sampling.fields) == ({"tokenizer.scales": tuple(old["scales"])} if old["scales"] else {})
    own, _ = options_of([str(tmp_path)])
    assert own.sampling == drawer.sampling
