"""One entry of a file as several of our arrays."""

import jax
import numpy as np
import pytest

from ar_jax.convert.names import PLAIN, Layout, key_shapes, to_params, to_weights

ROWS = Layout(lambda x: x[None], lambda x: x[0], axis=1)
PARTS = {  # layout, sizes of the parts as rules say them, whole entry
    "equal": (PLAIN, 3, (6, 4)),
    "of sizes": (PLAIN, (1, 3, 2), (6, 4)),
    "along another axis": (ROWS, (1, 3, 2), (1, 6, 4)),
}


@pytest.mark.parametrize(("layout", "sizes", "shape"), PARTS.values(), ids=PARTS.keys())
def test_parts_of_an_entry_are_cut_out_and_put_together(layout, sizes, shape):
    rules = [(name, "table", layout._replace(part=(i, sizes))) for i, name in enumerate("abc")]
    each = sizes if isinstance(sizes, tuple) else (2, 2, 2)
    ours = {name: jax.ShapeDtypeStruct((size, 4), np.float32) for name, size in zip("abc", each)}
    assert key_shapes(ours, rules) == {"table": shape}
    whole = np.arange(24, dtype=np.float32).reshape(shape)
    params = to_params({"table": whole}, ours, rules)
    np.testing.assert_array_equal(params["b"], whole.reshape(6, 4)[each[0] : each[0] + each[1]])
    np.testing.assert_array_equal(to_weights(params, rules)["table"], whole)
    for wrong in (whole[..., :3], whole.reshape(6, 4)[:5].reshape(*shape[:-2], 5, 4), whole.reshape(-1)[:5]):
        with pytest.raises(ValueError, match=r"table \(our a\) has another shape than the model's"):
            to_params({"table": wrong}, ours, rules)


def test_layers_one_by_one_may_be_parts_of_entries_too():
    rules = [(name, "layers.{}.table", PLAIN._replace(part=(i, 2))) for i, name in enumerate("ab")]
    ours = {name: jax.ShapeDtypeStruct((3, 2, 4), np.float32) for name in "ab"}
    whole = {f"layers.{i}.table": np.arange(16, dtype=np.float32).reshape(4, 4) + i for i in range(3)}
    assert key_shapes(ours, rules) == dict.fromkeys(whole, (4, 4))
    params = to_params(whole, ours, rules)
    np.testing.assert_array_equal(params["b"][1], whole["layers.1.table"][2:])
    back = to_weights(params, rules)
    assert back.keys() == whole.keys()
    for key, value in whole.items():
        np.testing.assert_array_equal(back[key], value)
    with pytest.raises(ValueError, match=r"layers\.0\.table \(our a\) has another shape than the model's"):
        to_params(whole | {"layers.2.table": np.ones((3, 4), np.float32)}, ours, rules)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_not_finite_is_refused_by_its_key(bad, dtype):
    ours = {name: jax.ShapeDtypeStruct((3,), dtype) for name in "ab"}
    weights = {name: np.ones(3, jax.numpy.dtype(dtype)) for name in ("x", "y")}
    weights["y"][1] = bad
    with pytest.raises(ValueError, match=r"y \(our b\) holds NaN or infinity"):
        to_params(weights, ours, [("a", "x", PLAIN), ("b", "y", PLAIN)])
