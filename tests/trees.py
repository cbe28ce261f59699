"""Trees for tests: random parameters without a program per shape, initial ones by one program, which of them moved; model.json."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ar_jax.convert.sources import param_shapes


def random_params(module: Any, scale: float, seed: int = 1) -> Any:
    """Float32 parameters, normal with a standard deviation of `scale` everywhere: zeros would prove nothing."""
    random, shapes = np.random.default_rng(seed), param_shapes(module)
    params = jax.tree.map(lambda x: random.normal(0, scale, x.shape).astype(np.float32), shapes)
    with jax.ensure_compile_time_eval():  # whoever asks first may be tracing
        return jax.device_put(params)


def initial_params(module: Any, seed: int = 0) -> Any:
    """Those of `init_params`; outside of jit, each of its operations would be compiled by itself."""
    return jax.jit(module.init_params)(jax.random.key(seed))


def never_moved(before: Any, after: Any) -> set[str]:
    """Names of the arrays that are equal in both."""
    same = jax.tree.map(np.array_equal, jax.device_get(before), jax.device_get(after))
    return {jax.tree_util.keystr(path) for path, equal in jax.tree_util.tree_leaves_with_path(same) if equal}


def changed(folder: Path, name: str, value: Any) -> None:
    """Writes another value into a folder's model.json, at a path such as "module.backbone.layers"."""
    content = json.loads((folder / "model.json").read_text())
    *inside, last = name.split(".")
    place = content
    for part in inside:
        place = place[part]
    place[last] = value
    (folder / "model.json").write_text(json.dumps(content))
