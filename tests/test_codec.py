import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import changed

from ar_jax.config import Experiment
from ar_jax.data import Info
from ar_jax.decode.logits import Filter
from ar_jax.decode.sampling import Sampling
from ar_jax.files import codec, models, trust
from ar_jax.generators.block_flow import BlockFlow, Until
from ar_jax.generators.causal import Causal
from ar_jax.heads.flow import Flow, Times, uniform
from ar_jax.nets.conditioning import Caption, Label
from ar_jax.nets.gated import EncoderDecoder
from ar_jax.nets.transformer import Transformer
from ar_jax.nets.vit import ViT
from ar_jax.orders import Cells, Order, OrderFn, Shuffled, known_first, raster, scales
from ar_jax.tokenizers.quantize import VectorLoss
from ar_jax.tokenizers.vit_vqgan import ViTVQGAN
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.tokens import TokenSpec, grid
from ar_jax.train.exported import Exported
from ar_jax.typing import Array, Float

SPEC = TokenSpec(grid(2, 3), codes=(11,))


def causal(conditioning=Label(16), layers=2, dtype=jnp.bfloat16):
    module = Causal(Transformer(layers, 16, 2, dtype=dtype), conditioning, dropout=0.1)
    return module.complete(SPEC, Info(classes=3, captions=True, text_rows=4, text_width=6))


@pytest.fixture(autouse=True)
def nobody_is_trusted(monkeypatch):
    monkeypatch.setattr(trust, "_trusted", set())
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv(trust.VARIABLE, raising=False)


def there_and_back(value, kind=Any):
    return codec.decode(json.loads(json.dumps(codec.encode(value))), kind)


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
    [None, True, 3, 2.5, "text", (), (1, ("a", None)), VectorLoss(commit=0.5), Filter(top_k=3)],
)
def test_plain_values_and_dataclasses_come_back_equal(value):
    back = there_and_back(value)
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize("order", [raster, scales, Shuffled(5), Cells(2)])
def test_orders_come_back_equal(order):
    assert there_and_back(order, OrderFn) == order


@pytest.mark.parametrize("grid", [uniform, Until(0.1), Times((1.0, 0.5, 0.0))])
def test_functions_in_fields_come_back(grid):
    for module in (Flow(grid=grid), BlockFlow(EncoderDecoder(1, 16, 2), Label(16), grid=grid)):
        assert there_and_back(module, nn.Module) == module


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


@pytest.mark.parametrize("value", [object(), {"a": 1}, {1, 2}, np.linalg.norm])
def test_what_has_no_form_is_not_written(value):
    with pytest.raises(ValueError, match="cannot be written to JSON"):
        codec.encode(value)


# Whose names are looked up ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Outside:
    size: int = 1
    places: tuple[int, ...] = (-1,)


def diagonal(spec: TokenSpec, keys: Any = None, images: int = 1, train_step: Any = 0) -> Order:
    return raster(spec)


def unsaid(spec, keys, images, train_step):
    return raster(spec)


HERE = Outside.__module__


def made(name, module, **fields):
    """A value of a dataclass that says to lie in a module."""
    kind = dataclasses.make_dataclass(name, list(fields))
    kind.__module__ = module
    return kind(**fields)


def test_a_module_in_two_places_is_not_written():
    backbone = ViT(1, 8, 2)
    with pytest.raises(ValueError, match=r"^encoder and decoder of ViTVQGAN are the same module"):
        codec.encode(ViTVQGAN(encoder=backbone, decoder=backbone))
    assert codec.encode(ViTVQGAN(encoder=backbone, decoder=backbone.clone()))


def test_names_from_outside_are_written_and_this_process_trusts_what_it_wrote():
    written = codec.encode([Outside(2, (-5,)), diagonal])
    assert written == [{"type": f"{HERE}:Outside", "size": 2, "places": [-5]}, {"function": f"{HERE}:diagonal"}]
    assert codec.decode(written[0], Outside) == Outside(2, (-5,))
    assert codec.decode(written[1], OrderFn) is diagonal
    assert codec.files(written) == {HERE: os.path.realpath(__file__)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lambda x: x, "<lambda> cannot be found again by its name"),
        (lambda: nn.Dense(3), "init cannot be found again by its name"),  # a function made by another one
        (lambda: type("Gone", (Outside,), {})(), "Gone cannot be found again by its name"),
        (
            lambda: made("A", "__main__"),
            "A lies in the script that runs; put it into",
        ),
        (lambda: made("A", "mine"), r"A lies in mine\.py, which is a config"),
        (lambda: made("A", HERE, type=1), "has a field named type"),
    ],
)
def test_what_could_not_be_found_again_is_not_written(make, message):
    with pytest.raises(ValueError, match=message):
        codec.encode(make())


HOSTILE = [
    ({"type": "os:system", "command": "touch hacked"}, "'os:system' lies outside ar_jax"),
    ({"function": "os:system"}, "'os:system' lies outside ar_jax"),
    ({"function": "subprocess:run"}, "'subprocess:run' lies outside ar_jax"),
    ({"type": "builtins:eval"}, "'builtins:eval' lies outside ar_jax"),
    ({"type": "this:that"}, "'this:that' lies outside ar_jax"),
    ({"type": "ar_jaxx:Model"}, "'ar_jaxx:Model' lies outside ar_jax"),
    ({"type": "ar_jax"}, "no name of a class or function"),
    ({"type": "ar_jax.files.codec:importlib.import_module"}, "no name of a class or function"),
    ({"type": "ar_jax.tokens:TokenSpec.zeros"}, "no name of a class or function"),
    ({"type": "..os:system"}, "no name of a class or function"),
    ({"type": 3}, r"\.type is 3; it must be a name"),
    ({"function": ["os:system"]}, r"\.function is .'os:system'.; it must be a name"),
    ({}, "it must be a number no larger than 2"),
    ({"type": "ar_jax.files.codec:importlib"}, "no part of a model"),
    ({"type": "ar_jax.files.models:Model"}, "no part of a model"),
    ({"function": "ar_jax.train.checkpoint:_set_aside"}, "no part of a model"),
    ({"function": "ar_jax.files.models:write_json"}, "no part of a model"),
    ({"type": "ar_jax.config:Experiment"}, "no part of a model"),
    ({"type": "ar_jax.orders_evil:Thing"}, "no part of a model"),
    ({"function": "ar_jax.typing:beartype"}, "no part of a model"),
    ({"type": "ar_jax.orders:dataclasses"}, "is not defined there"),
    ({"type": "ar_jax.nets.transformer:TokenSpec"}, "is not defined there"),
    ({"type": "ar_jax.orders:raster"}, "which is no dataclass"),
    ({"function": "ar_jax.tokenizers.vqgan:VQGAN"}, "which is no function"),
    ({"type": "ar_jax.generators.no_such_file:Thing"}, "is not in this version of ar_jax"),
    ({"type": "ar_jax.orders:Spiral"}, "does not exist in this version of ar_jax"),
    ({"type": "ar_jax.decode.logits:Filter", "top_q": 1.0}, "has 'top_q', which is no field of Filter; it has top_k"),
    ({"type": "ar_jax.nets.transformer:Transformer"}, r"value\.commit\.layers is missing"),
    ({"function": "ar_jax.orders:raster"}, "it must be a number no larger than 2"),  # no function is expected there
    ({"type": "\x1b[2J" + "x" * 10**6 + ":y"}, r"'\\x1b\[2Jx+\.\.\.x+:y' is no name"),
]


@pytest.mark.parametrize(("value", "message"), HOSTILE)
def test_names_that_a_file_has_no_right_to_are_refused(value, message):
    with pytest.raises(ValueError, match=r"^value\[0\]\.commit"):
        codec.decode([{"type": "ar_jax.tokenizers.quantize:VectorLoss", "commit": value}], Any)
    with pytest.raises(
        ValueError, match=r"^value\.commit: |^value\.commit"
    ) as caught:  # and so where anything may stand
        codec.decode(value, Any, "value.commit")
    assert caught.match(message)
    assert len(str(caught.value)) < 500


def test_nothing_is_imported_that_is_not_trusted(tmp_path, monkeypatch):
    package = tmp_path / "strange_package"
    package.mkdir()
    (package / "__init__.py").write_text("import pathlib; pathlib.Path(__file__).with_name('ran').touch()")
    (package / "net.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(trust.Untrusted, match="runs the code of strange_package"):
        codec.decode({"type": "strange_package.net:Net"}, nn.Module)
    assert not (package / "ran").exists()
    assert "strange_package" not in sys.modules


METHOD = """
import dataclasses
import os
from os.path import join

@dataclasses.dataclass(frozen=True)
class Part:
    size: int = 1
    class Inner: pass

def whole(spec, *rest) -> "Order": ...
"""


@pytest.fixture
def method(tmp_path, monkeypatch):
    """A file with a method, that no path leads to yet, and one beside it whose name begins alike."""
    for name in ("my_method", "my_method_evil"):
        (tmp_path / f"{name}.py").write_text(METHOD)
    yield tmp_path / "my_method.py"
    for name in ("my_method", "my_method_evil"):
        sys.modules.pop(name, None)


def test_a_program_that_a_model_names_runs_only_where_it_is_trusted(monkeypatch):
    value = {"type": "ar_jax.train.exported:Exported", "path": "evil.export"}
    monkeypatch.setattr(trust, "_trusted", set())
    with pytest.raises(
        trust.Untrusted, match=r"^value.type: .* give --trust ar_jax\.train\.exported or set AR_JAX_TRUST="
    ):
        codec.decode(value, Any)
    written = codec.encode(Exported("mine.export"))  # by a run of one's own, which goes on with it
    assert codec.decode(written, Any) == Exported("mine.export")
    monkeypatch.setattr(trust, "_trusted", set())
    trust.trust("ar_jax.train.exported")
    assert codec.decode(value, Any) == Exported("evil.export")


def test_what_to_give_is_said_word_for_word_and_works(method, monkeypatch):
    value = {"type": "my_method:Part", "size": 3}
    asked = (
        "value.type: 'my_method:Part' lies outside ar_jax, and to open this model runs the code of my_method. If you trust that "
        "code, give --trust {0} or set AR_JAX_TRUST={0}"
    )
    with pytest.raises(trust.Untrusted) as caught:
        codec.decode(value, Any)
    assert str(caught.value) == asked.format("my_method")
    for hint in ("/no/such/my_method.py", str(method.with_name("my_method_evil.py")), 3, f"{method}\n", "\0"):
        with pytest.raises(trust.Untrusted) as caught:
            codec.decode(value, Any, hints={"my_method": hint})
        assert str(caught.value) == asked.format("my_method")
    with pytest.raises(trust.Untrusted) as caught:
        codec.decode(value, Any, hints={"my_method": str(method)})
    assert str(caught.value) == asked.format(method)
    assert trust.taken(["a", "--trust", "my_method", "b"]) == ["a", "b"]
    with pytest.raises(ValueError, match=r"it cannot be found here; give its path, --trust PATH/my_method\.py"):
        codec.decode(value, Any)
    assert trust.taken(["a", f"--trust={method}", "b"]) == ["a", "b"]
    assert codec.decode(value, Any).size == 3


def test_the_environment_may_say_it_too(method, monkeypatch):
    monkeypatch.setenv(trust.VARIABLE, f"other,{method}")
    assert codec.decode({"type": "my_method:Part"}, Any).size == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_method_evil:Part", "'my_method_evil:Part' lies outside ar_jax"),
        ("my_method:os", "is not defined there"),
        ("my_method:join", "is not defined there"),
        ("my_method:os.system", "no name of a class or function"),
        ("my_method:Part.Inner", "no name of a class or function"),
        ("my_method.os:system", r"needs the module my_method\.os, but"),
        ("my_method:Gone", "does not exist there"),
        ("my_method:whole", "which is no dataclass"),
    ],
)
def test_trust_in_a_module_is_trust_in_what_it_defines(method, name, message):
    trust.trust(str(method))
    with pytest.raises(ValueError, match=message):
        codec.decode({"type": name}, Any)


def test_trust_needs_a_name(tmp_path):
    for arguments in (["--trust"], ["--trust", "--seed"], ["--trust="]):
        with pytest.raises(ValueError, match="--trust needs a name"):
            trust.taken(arguments)
    with pytest.raises(ValueError, match="there is no such file, and no package"):
        trust.trust(str(tmp_path / "gone.py"))
    with pytest.raises(ValueError, match=r"--trust 'my-package' is no module"):
        trust.trust("my-package")


def test_code_that_fails_when_imported_is_named(method):
    method.write_text("1 / 0")
    trust.trust(str(method))
    with pytest.raises(ValueError, match="needs the module my_method, but ZeroDivisionError: division by zero"):
        codec.decode({"type": "my_method:Part"}, Any)


def test_moved_names_are_found(monkeypatch):
    monkeypatch.setitem(codec.MOVED, "ar_jax.old:Losses", "ar_jax.tokenizers.quantize:VectorLoss")
    assert codec.decode({"type": "ar_jax.old:Losses", "commit": 0.5}, Any) == VectorLoss(commit=0.5)
    for name in codec.MOVED.values():
        module, _, attribute = name.partition(":")
        assert hasattr(importlib.import_module(module), attribute)


# What may stand where --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        {"function": "ar_jax.orders:known_first"},  # four arguments, an order comes back, but it is made of another one
        {"function": "ar_jax.orders:grouped"},
        {"function": "ar_jax.orders:to_ranks"},
        {"function": "ar_jax.heads.flow:uniform"},
        {"type": "ar_jax.generators.block_flow:Until"},
        {"type": "ar_jax.tokenizers.vqgan:VQGAN"},
        {"function": f"{HERE}:unsaid"},
        {"type": f"{HERE}:Outside"},
        "ar_jax.orders:raster",
        None,
    ],
)
def test_an_order_is_what_is_annotated_as_one(value):
    assert known_first.__module__ == "ar_jax.orders"
    trust.trust(HERE)
    with pytest.raises(
        ValueError, match=r"(it|value) must be Callable\[\[ar_jax\.tokens\.TokenSpec, .*ar_jax\.orders\.Order\]$"
    ):
        codec.decode(value, OrderFn)


@dataclasses.dataclass(frozen=True)
class Many:
    number: float = 0.0
    choice: Literal["a", 1] = "a"
    pair: tuple[int, str] | None = None
    rule: Callable[[int], np.ndarray] = uniform
    anything: Callable | None = None
    array: np.ndarray | None = None


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("number", "1", "it must be a number from -16777216 to 16777216"),
        ("number", True, "it must be a number from"),
        ("choice", "b", "it must be one of 'a', 1"),
        ("choice", True, "it must be one of 'a', 1"),
        ("pair", [1], "it must be tuple.int, str. or null"),
        ("pair", [1, 2], r"\[1\] is 2; it must be text"),
        ("rule", {"function": "ar_jax.orders:raster"}, r"it must be Callable\[\[int\]"),
        ("anything", {"function": "ar_jax.orders:raster"}, "it must be"),  # nothing says that it is of use there
        ("array", {"array": [[1], [2, 3]], "dtype": "int32"}, "no array of numbers"),
        ("array", {"array": ["1"], "dtype": "int32"}, "no array of numbers"),
        ("array", {"array": "1" * 1000, "dtype": "int32"}, "no array of numbers"),
        ("array", {"array": [300], "dtype": "int8"}, "numbers that int8 cannot hold"),
        ("array", {"array": [1.5], "dtype": "int32"}, "numbers that int32 cannot hold"),
        ("array", {"array": [2**70], "dtype": "int32"}, "no array of numbers"),
        ("array", {"array": [1], "dtype": "U1000000000"}, "dtype is 'U1000000000'; it must be one of"),
        ("array", {"array": [1], "dtype": ["O"]}, r"dtype is \['O'\]; it must be one of"),
        ("array", {"dtype": "float32"}, "it must be ndarray or null"),
    ],
)
def test_fields_are_held_to_their_annotations(field, value, message):
    trust.trust(HERE)
    with pytest.raises(ValueError, match=rf"^value\.{field}.*{message}"):
        codec.decode({"type": f"{HERE}:Many", field: value}, Many)


def halved(logits: Float[Array, "b v"]) -> Array:
    return logits / 2


@dataclasses.dataclass(frozen=True)
class Filtered:
    filter: Callable = Filter()


def test_a_plain_callable_is_one_like_the_default():
    for filter in (Filter(3), halved):
        assert there_and_back(Filtered(filter), Filtered) == Filtered(filter)
    for name in ("diagonal", "unsaid"):
        with pytest.raises(ValueError, match=r"^value\.filter is '.*'; it must be Callable"):
            codec.decode({"type": f"{HERE}:Filtered", "filter": {"function": f"{HERE}:{name}"}}, Filtered)


def test_what_is_by_default_negative_may_be():
    for places, least in (((-1,), -codec.LARGEST), ((1,), 1), ((), 0), (-1, -codec.LARGEST), (1, 1), (0, 0)):
        kind = tuple[int, ...] if isinstance(places, tuple) else int
        ours = dataclasses.make_dataclass("Ours", [("places", kind, places)])
        ours.__module__ = "ar_jax.orders"
        given = [-2] if isinstance(places, tuple) else -2
        if least < 0:
            assert codec.build(ours, {"places": given}, "value").places in ((-2,), -2)
        else:
            with pytest.raises(ValueError, match=rf"^value\.places.* is -2; it must be a whole number from {least} to"):
                codec.build(ours, {"places": given}, "value")


def test_what_fits_the_annotations_comes_back():
    value = Many(1, 1, (2, "b"), Until(), diagonal, np.float32([0.5]))
    back = there_and_back(value, Many)
    np.testing.assert_array_equal(back.array, value.array)
    assert dataclasses.replace(back, array=None) == dataclasses.replace(value, array=None)


# model.json ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    settings = {
        "tokenizer": "../tokenizer", "order": codec.encode(raster), "sampling": codec.encode(Sampling()),
        "data": {"size": 32}, "origin": {"family": "llamagen", "file": "a.pt", "entry": "", "buffers": []},
    }  # fmt: skip
    models.describe(tmp_path, "generator", causal(), Info(classes=3), settings)
    return tmp_path


WRONG = {
    "module.backbone.layers": ("2", 2.0, [2], 10**9, 0, -1, float("nan"), None, True, {"dtype": "int32"}),
    "module.backbone.width": ("16", -16, 0),
    "module.backbone.remat": ("some", 1),
    "module.backbone.dtype": ({"dtype": "object"}, {"dtype": 3}, {"dtype": "int32"}, "float32", 3, [], None),
    "module.backbone.base": (0, -1.0, 1e9, 1e308, 10**400),
    "module.backbone.eps": (-1e-5, "1e-5"),
    "module.backbone.hidden": (-1, 2**24 + 1),
    "module.backbone": (None, 3, {"type": "ar_jax.heads.categorical:Categorical"}, {"type": "ar_jax.orders:Cells"}),
    "module.head": (
        {"type": "ar_jax.orders:Cells"}, {"function": "ar_jax.orders:raster"},
        {"type": "ar_jax.tokenizers.vqgan:VQGAN"}, {"type": "ar_jax.nets.conditioning:Label", "width": 16},
    ),
    "module.head.codes": (0, 12),
    "module.dropout": ("0.1", float("inf"), float("nan"), -0.1, 1.5, 10**9),
    "module.emphasis": ("none", None),
    "module.spec": (None,),
    "module.spec.codes": (11, ["11"], [-1], [10**9]),
    "module.spec.coords": ([[0, 0, 0]], {"array": [0, 0, 0], "dtype": "int32"}, {"array": [[0, 0, 2**24]], "dtype": "int32"}),
    "module.conditioning.classes": (10**9, -3, "3", 4),
    "module": (None, [], {"type": "ar_jax.tokenizers.vqgan:VQGAN"}, {"type": "ar_jax.orders:Cells"}),
    "info.classes": ("3", 10**9, -1, 2.5),
    "info.class_names": ("abc", [1, 2, 3], ["a"]),
    "info.surplus": (1,),
    "info": (None, []),
    "settings.order": ({"function": "ar_jax.train.checkpoint:_set_aside"}, {"type": "ar_jax.orders:Shuffled", "steps": "8"}, []),
    "settings.tokenizer": (3, ["a"], "a" * 10**6),
    "settings.origin.buffers": ("abc", [3], [[]]),
    "settings.origin.family": (3, []),
    "settings.origin": (3, [], "a" * 10**6),
    "settings.sampling": ([], "x", {"guidnce": 1}),
    "settings.sampling.guidance": (2.0, {"type": "ar_jax.decode.logits:Filter"}, {"function": "ar_jax.orders:raster"}),
    "settings.sampling.guidance.weight": ("2", [], float("nan"), 1e308, -1.0, None),
    "settings.sampling.temperature.value": (-1, float("inf")),
    "settings.sampling.filter.top_p": (0, 1.5, "1"),
    "settings.sampling.filter.banned": (3, [-1], [1.5], list(range(11)), [11]),
    "settings.sampling.decoder.segments": (-1, 1.5, "4"),
    "settings.sampling.soft": (1, "no"),
    "settings.data.size": ("32", 0, -1, 10**9),
    "settings.data.surplus": (1,),
    "settings": (None, []),
    "kind": ("tokeniser", None, []),
    "format": (2, None, "1", True),
    "code": ([],),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_fields_of_wrong_kinds_are_one_sentence_that_names_file_and_field(folder, name):
    whole = (folder / "model.json").read_text()
    for value in WRONG[name]:
        (folder / "model.json").write_text(whole)
        changed(folder, name, value)
        with pytest.raises(ValueError, match="no model description") as caught:
            models.open_model(folder, "generator")
        said = str(caught.value)
        assert said.startswith(f"{folder / 'model.json'} is no model description: "), said
        assert "\n" not in said
        assert len(said) < 700
        owner, _, field = name.rpartition(".")
        assert name in said or (owner in said and field in said), said


def test_networks_of_senseless_sizes_are_one_sentence(folder):
    changed(folder, "module.backbone.heads", 7)
    with pytest.raises(
        ValueError, match=r"model\.json: the network of its module cannot be built: .*width / heads"
    ) as caught:
        models.open_model(folder, "generator").fixed()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b"[]", "not an object"),
        (b"{", "Expecting"),
        (b"\xff\xfe", "can't decode byte"),
        (b"[" * 10**5 + b"]" * 10**5, "nested too deeply|not an object"),
        (b"9" * 10**4, "Exceeds the limit|not an object"),
        (b" " * (codec.LONGEST + 1), "more than 33554432 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_that_are_no_description_are_one_sentence(tmp_path, content, message):
    (tmp_path / "model.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"model\.json is no model description: .*({message})"):
        models.open_model(tmp_path, "generator")


def test_a_pipe_in_the_place_of_a_file_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "model.json")
    with pytest.raises(ValueError, match=r"holds no model\.json"):
        models.open_model(tmp_path, "generator")
    with pytest.raises(ValueError, match="it is no regular file"):
        codec.read_json(tmp_path / "model.json")


def test_what_could_not_be_opened_again_is_not_described(tmp_path):
    with pytest.raises(ValueError, match=r"settings\.order is .*; it must be Callable"):
        models.describe(tmp_path, "generator", causal(), Info(classes=3), {"order": codec.encode(unsaid)})
    assert not list(tmp_path.iterdir())
    codec.encode(Experiment())  # what says how a run came about may name more than a model folder
