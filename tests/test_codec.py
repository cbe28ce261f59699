import dataclasses
import importlib
import json
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import Sampling
from ar_jax.data import Info
from ar_jax.decode.logits import Filter
from ar_jax.files import codec
from ar_jax.generators.causal import Causal
from ar_jax.nets.conditioning import Caption, Label
from ar_jax.nets.transformer import Transformer
from ar_jax.orders import raster
from ar_jax.tokenizers.quantize import VectorLoss
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.tokens import TokenSpec, grid

SPEC = TokenSpec(grid(2, 3), codes=(11,))


def causal(conditioning=Label(16), layers=2, dtype=jnp.bfloat16):
    module = Causal(Transformer(layers, 16, 2, dtype=dtype), conditioning, dropout=0.1)
    return module.complete(SPEC, Info(classes=3, captions=True, text_rows=4, text_width=6))


def there_and_back(value):
    return codec.decode(json.loads(json.dumps(codec.encode(value))))


def test_a_generator_comes_back_with_its_tokens():
    module = causal()
    back = there_and_back(module)
    assert isinstance(back, Causal)
    assert back.backbone == module.backbone
    assert back.conditioning == module.conditioning
    assert back.head == module.head
    assert back.dropout == 0.1
    np.testing.assert_array_equal(back.spec.coords, SPEC.coords)
    assert back.spec.coords.dtype == np.int32
    assert back.spec.codes == (11,)
    assert codec.encode(back) == codec.encode(module)


@pytest.mark.parametrize("module", [causal(), causal(Caption(16)), VQGAN((16, 16), features=4, mult=(1, 2), groups=2)])
def test_a_module_that_came_back_has_the_same_parameters(module):
    shapes = lambda module: jax.eval_shape(module.init_params, jax.random.key(0))  # noqa: E731
    assert shapes(there_and_back(module)) == shapes(module)


def test_a_tokenizer_comes_back_with_its_nested_settings():
    module = VQGAN((16, 24), mult=(1, 2), decoder_mult=(2, 2), vq=VectorLoss(entropy=0.02), dtype=jnp.bfloat16)
    assert there_and_back(module) == module


@pytest.mark.parametrize(
    "value",
    [None, True, 3, 2.5, "text", (), (1, ("a", None)), VectorLoss(commit=0.5), Sampling(filter=Filter(3)), raster],
)
def test_plain_values_dataclasses_and_functions_come_back_equal(value):
    back = there_and_back(value)
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_dtypes_come_back_as_the_types_that_configs_use(dtype):
    assert codec.encode(dtype) == {"dtype": jnp.dtype(dtype).name}
    assert jnp.dtype(there_and_back(dtype)) == jnp.dtype(dtype)


@pytest.mark.parametrize("array", [np.arange(6, dtype=np.int32).reshape(2, 3), np.float32([0.1, -3])])
def test_arrays_come_back_with_their_numbers_and_dtype(array):
    back = there_and_back(array)
    np.testing.assert_array_equal(back, array)
    assert back.dtype == array.dtype


def test_the_first_difference_is_named():
    a, b = codec.encode(causal()), codec.encode(causal(layers=3, dtype=jnp.float32))
    assert codec.difference(a, a) == ""
    assert codec.difference(a, b) == "module.backbone.layers is 2 there and 3 here"
    assert codec.difference({"x": 1}, {"x": 1, "y": 2}) == "module.y is only on one side"
    assert codec.difference({"x": 1, "y": 2}, {"x": 1}) == "module.y is only on one side"
    assert (
        codec.difference({"x": {"y": [1, 2]}}, {"x": {"y": [1, 3]}}, "run") == "run.x.y is [1, 2] there and [1, 3] here"
    )
    assert "type is 'ar_jax.tokenizers.vqgan:VQGAN' there" in codec.difference(codec.encode(VQGAN()), a)


@dataclasses.dataclass(frozen=True)
class Outside:
    size: int = 1


@pytest.mark.parametrize("value", [Outside(), nn.Dense(3), lambda x: x, np.linalg.norm])
def test_what_lies_outside_the_package_is_not_written(value):
    with pytest.raises(ValueError, match=r"lies outside ar_jax|cannot be written to JSON"):
        codec.encode(value)


@pytest.mark.parametrize("value", [object(), {"a": 1}, {1, 2}])
def test_what_has_no_form_is_not_written(value):
    with pytest.raises(ValueError, match="cannot be written to JSON"):
        codec.encode(value)


HOSTILE = [
    {"type": "os:system", "command": "touch hacked"},
    {"function": "os:system"},
    {"function": "subprocess:run"},
    {"type": "builtins:eval"},
    {"type": "this:that"},
    {"type": "ar_jaxx:Model"},
    {"type": "ar_jax"},
    {"type": "ar_jax.files.codec:importlib.import_module"},
    {"type": 3},
    {},
]


@pytest.mark.parametrize("value", HOSTILE)
def test_names_outside_the_package_are_refused(value):
    with pytest.raises(ValueError, match="only things inside ar_jax are allowed"):
        codec.decode([{"type": "ar_jax.tokenizers.quantize:VectorLoss", "commit": value}])


def test_a_refused_module_is_not_even_imported():
    sys.modules.pop("this", None)
    with pytest.raises(ValueError, match="'this:that'; only things inside ar_jax"):
        codec.decode({"type": "this:that"})
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"type": "ar_jax.files.codec:importlib"}, "which is no dataclass"),
        ({"function": "ar_jax.files.codec:json"}, "which this version of ar_jax does not have"),
        ({"type": "ar_jax.files.models:os"}, "which is no dataclass"),
        ({"function": "ar_jax.files.models:os"}, "which is no function"),
        ({"type": "ar_jax.data.base:Unreadable"}, "which is no dataclass"),
        ({"function": "ar_jax.tokenizers.vqgan:VQGAN"}, "which is no function"),
        ({"type": "ar_jax.orders:raster"}, "which is no dataclass"),
        ({"type": "ar_jax.no_such_file:Thing"}, "which this version of ar_jax does not have"),
        ({"type": "ar_jax.orders:Spiral"}, "which this version of ar_jax does not have"),
        ({"type": "ar_jax.config:Sampling", "guidnce": 1.0}, "Sampling: .*guidnce"),
    ],
)
def test_names_inside_the_package_must_be_of_the_right_kind(value, message):
    with pytest.raises(ValueError, match=message):
        codec.decode(value)


@pytest.mark.parametrize("value", [{"function": "ar_jax.typing:beartype"}])
def test_names_that_a_module_of_ours_merely_imports_are_refused(value):
    module, _, name = next(iter(value.values())).partition(":")
    assert hasattr(importlib.import_module(module), name), "take another example"
    with pytest.raises(ValueError, match=r"which is no (function|dataclass) of it"):
        codec.decode(value)
