"""Which of several weights in a file are taken, under which names, and what is said of it."""

import json
from collections import OrderedDict

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_reader import Storage, Tensor, save
from test_strangers import MODULES, shapes_of

from ar_jax.convert.__main__ import main
from ar_jax.convert.choose import choose, identified
from ar_jax.files.weights import CONTENTS, read_weights

KINDS = {"float32": "FloatStorage", "float64": "DoubleStorage", "int64": "LongStorage"}


def weights_of(name, fill=0.0, before="", dtype=np.float32):
    """Entries of a tiny network of `MODULES`, all of one number."""
    return {before + key: np.full(shape, fill, dtype) for key, shape in shapes_of(name)[0].items()}


def torch_file(path, tree):
    """What torch.save writes of dicts of arrays and other values."""
    storages = {}

    def saved(value):
        if isinstance(value, dict):
            return OrderedDict((key, saved(inner)) for key, inner in value.items())
        if not isinstance(value, np.ndarray):
            return value
        key = str(len(storages))
        storages[key] = value
        strides = tuple(int(np.prod(value.shape[axis + 1 :])) for axis in range(value.ndim))
        return Tensor(Storage(key, KINDS[str(value.dtype)]), 0, value.shape, strides, False, OrderedDict())

    tree = saved(tree)
    return save(path, tree, storages)


@pytest.mark.parametrize(
    ("name", "tree", "taken", "said"),
    [
        ("mar", ("model", "model_ema"), "model_ema", "takes model_ema, the moving average, which its authors evaluate; also there: model"),
        ("xar", ("model", "model_ema"), "model_ema", "the moving average"),
        ("flowar", ("ema", "module"), "ema", "the moving average"),
        ("mar", ("model",), "model", "takes model\n"),
        ("llamagen", ("ema", "model"), "model", "takes model; also there: ema (--entry NAME)"),
        ("llamagen_vq", ("ema", "model"), "model", "also there: ema"),
        ("var", ("ema_only",), "ema_only", "takes ema_only\n"),
    ],
)  # fmt: skip
def test_the_average_is_taken_where_its_authors_evaluate_it_and_all_are_named(
    tmp_path, capsys, name, tree, taken, said
):
    sets = {entry: weights_of(name, i) for i, entry in enumerate(tree)}
    path = torch_file(tmp_path / "a.pt", {**sets, "optimizer": {"state": {"x": np.zeros(3)}}, "epoch": 3})
    entry, weights = choose(path)
    assert entry == taken
    assert {float(value.flat[0]) for value in weights.values() if value.size} == {float(tree.index(taken))}
    assert f"{path}: {said}" in (out := capsys.readouterr().out) or said in out
    for other in tree:
        assert choose(path, other)[0] == other


def test_nested_entries_are_listed_or_taken_if_nothing_else_can_be_meant(tmp_path, capsys):
    both = {"trainer": {"var_wo_ddp": weights_of("var"), "vae_local": weights_of("var_vq")}, "epoch": 3}
    path = torch_file(tmp_path / "a.pt", both)
    with pytest.raises(ValueError, match=r"--entry NAME .*trainer\.var_wo_ddp \(dict of \d+\), trainer\.vae_local"):
        choose(path)
    assert choose(path, "trainer.vae_local")[1].keys() == weights_of("var_vq").keys()
    del both["trainer"]["vae_local"]
    assert choose(torch_file(path, both))[0] == "trainer.var_wo_ddp"
    assert "takes trainer.var_wo_ddp" in capsys.readouterr().out


@pytest.mark.parametrize(
    "before", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "trainer.model."]
)
def test_what_stands_before_all_names_is_left_out_and_said(tmp_path, capsys, before):
    save_file(weights_of("llamagen", 1.0, before), tmp_path / "a.safetensors")
    _, weights = choose(tmp_path / "a.safetensors")
    found, weights = identified(tmp_path / "a.safetensors", weights, **MODULES["llamagen"][1])
    assert (found.family, weights.keys()) == ("llamagen", shapes_of("llamagen")[0].keys())
    assert f"without {before}" in capsys.readouterr().out


def test_blocks_that_were_compiled_alone_are_known(tmp_path):
    inside = {key.replace("layers.0.", "layers.0._orig_mod."): value for key, value in weights_of("llamagen").items()}
    save_file(inside, tmp_path / "a.safetensors")
    assert choose(tmp_path / "a.safetensors")[1].keys() == weights_of("llamagen").keys()


def test_sets_in_one_dict_are_told_apart(tmp_path, capsys):
    both = weights_of("mar", 0.0, "model.") | weights_of("mar", 1.0, "ema.")
    save_file(both, tmp_path / "a.safetensors")
    entry, weights = choose(tmp_path / "a.safetensors")
    assert (entry, weights["mask_token"].max()) == ("ema", 1)
    assert "also there: model" in capsys.readouterr().out


def test_a_command_says_what_it_passed_over_and_narrowed(tmp_path, capsys):
    weights = weights_of("llamagen", 0.5) | {"norm.weight": np.full(16, 0.1)}  # float64
    stray = {"step": np.array(7), "decay": np.array(0.99, np.float32), "name": "a run", "epoch": 3}
    path = torch_file(tmp_path / "a.pt", {f"module.{key}": value for key, value in weights.items()} | stray)
    main([str(path), "--to", str(tmp_path / "out"), "--size", "64", "--heads", "2"])
    said = capsys.readouterr().out
    assert "passed over name, epoch, which are no tensors" in said
    assert "passed over step, decay: numbers that are no part of the network" in said
    assert "narrowed to float32: 1 entries in float64, such as norm.weight" in said
    main([str(tmp_path / "out"), "--back", str(tmp_path / "back.safetensors")])
    assert load_file(tmp_path / "back.safetensors")["norm.weight"][0] == np.float32(0.1)
    large = torch_file(tmp_path / "b.pt", weights | {"norm.weight": np.full(16, 1e300)})
    with pytest.raises(SystemExit, match=r"norm\.weight .* holds NaN or infinity"):
        main([str(large), "--to", str(tmp_path / "other"), "--size", "64", "--heads", "2"])


@pytest.mark.parametrize("form", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_shards_are_read_by_their_index(tmp_path, form):
    weights, places = weights_of("llamagen"), {}
    for i, some in enumerate((list(weights)[:5], list(weights)[5:])):
        name = f"part-{i}" + (".safetensors" if "safe" in form else ".bin")
        part = {key: weights[key] for key in some}
        save_file(part, tmp_path / name) if "safe" in form else torch_file(tmp_path / name, part)
        places |= dict.fromkeys(some, name)
    index = tmp_path / form
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    assert read_weights(index).keys() == weights.keys()
    assert identified(index, choose(index)[1], **MODULES["llamagen"][1])[0].family == "llamagen"
    for name, message in (
        ("../part-0.safetensors", "its shard '../part-0.safetensors' must be the name of a file beside it"),
        ("/etc/passwd", "must be the name of a file beside it"),
        ("..", "must be the name of a file beside it"),
        (form, "must be the name of a file beside it"),
        (7, "its shard 7 is missing"),
    ):
        index.write_text(json.dumps({"weight_map": places | {"norm.weight": name}}))
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            read_weights(index)
    index.write_text(json.dumps({"weight_map": places | {"none": places["norm.weight"]}}))
    with pytest.raises(ValueError, match="none is not in part-"):
        read_weights(index)
    for content in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {}}'):
        index.write_text(content)
        with pytest.raises(ValueError, match=r"is no index of shards|names no tensors"):
            read_weights(index)
    index.write_text(" " * (CONTENTS + 1))
    with pytest.raises(ValueError, match="are read at most"):
        read_weights(index)


def test_dicts_that_hold_themselves_are_looked_at_a_bounded_number_of_times(tmp_path):
    circle = {"x": {}}
    wide = {}
    for _ in range(4):
        wide = {f"k{i}": wide for i in range(300)}
    for tree in (circle, wide):
        with pytest.raises(ValueError, match="no weights under"):
            read_weights(save(tmp_path / "a.pt", tree))
