import collections
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ar_jax.config import GeneratorStage, Losses, TokenizerStage
from ar_jax.data import Info
from ar_jax.decode.guidance import Interval
from ar_jax.decode.sampling import Sampling
from ar_jax.generators.causal import Causal
from ar_jax.machine import sharding
from ar_jax.machine.hlo import Program
from ar_jax.machine.sharding import (
    MeshShape,
    batch_rows,
    batch_sharding,
    make_mesh,
    padded,
    put,
    put_batch,
    replicated,
    shard,
)
from ar_jax.nets.conditioning import Label
from ar_jax.nets.patchgan import PatchGan
from ar_jax.nets.transformer import Transformer
from ar_jax.orders import raster
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.tokens import TokenSpec, grid
from ar_jax.train.optim import Optim
from ar_jax.train.recipes import generator_recipe
from ar_jax.train.tokenizer import tokenizer_recipe

FOUR = (2, 2, 1)


def mesh_of(data, fsdp, tp):
    return make_mesh(MeshShape(data, fsdp, tp), jax.devices()[: data * fsdp * tp])


@pytest.mark.parametrize(
    ("shape", "devices", "sizes"),
    [
        (MeshShape(), 8, (8, 1, 1)),
        (MeshShape(data=2, fsdp=-1), 8, (2, 4, 1)),
        (MeshShape(data=1, fsdp=2, tp=-1), 4, (1, 2, 2)),
        (MeshShape(data=2, fsdp=2, tp=1), 4, (2, 2, 1)),
        (MeshShape(data=-1, fsdp=4), 4, (1, 4, 1)),
    ],
)
def test_one_axis_takes_the_devices_that_are_left(shape, devices, sizes):
    mesh = make_mesh(shape, jax.devices()[:devices])
    assert dict(mesh.shape) == dict(zip(("data", "fsdp", "tp"), sizes))


@pytest.mark.parametrize(
    "shape",
    [
        MeshShape(data=3),
        MeshShape(data=3, fsdp=-1),
        MeshShape(data=-1, fsdp=-1),
        MeshShape(data=16),
        MeshShape(data=-1, fsdp=0),
        MeshShape(data=-2, fsdp=-4, tp=1),
        MeshShape(data=-1, fsdp=-2),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(shape):
    with pytest.raises(ValueError, match=r"mesh \(data, fsdp, tp\) = .* does not fit 8 devices"):
        make_mesh(shape)


TREE = {
    "qkv": {"kernel": jax.ShapeDtypeStruct((3, 64, 192), jnp.float32)},  # three stacked layers
    "out": {"kernel": jax.ShapeDtypeStruct((64, 64), jnp.float32), "bias": jax.ShapeDtypeStruct((64,), jnp.float32)},
    "odd": {"kernel": jax.ShapeDtypeStruct((7, 9, 33), jnp.float32)},
    "count": jax.ShapeDtypeStruct((), jnp.int32),
}


def specs(rules=(), mesh=FOUR, **options):
    return jax.tree.map(lambda x: x.spec, shard(TREE, mesh_of(*mesh), rules, **options))


def test_without_a_rule_the_largest_divisible_axis_is_split():
    found = specs()
    assert found["qkv"]["kernel"] == P(None, None, "fsdp")
    assert found["out"]["kernel"] == P("fsdp"), "of equal axes the first"
    assert found["odd"]["kernel"] == P(), "no axis is divisible"
    assert found["count"] == P()
    assert specs(mesh=(4, 1, 1))["qkv"]["kernel"] == P(), "nothing to split over"


def test_small_arrays_stay_whole():
    assert specs()["out"]["bias"] == P()
    assert specs(smallest=64)["out"]["bias"] == P("fsdp")
    assert specs(smallest=64 * 64 + 1)["out"]["kernel"] == P()


def test_the_first_rule_that_matches_wins_and_speaks_of_the_last_axes():
    rules = [("qkv/kernel", P("fsdp", "tp")), ("out/kernel", P("tp", None)), ("kernel", P(None, "tp"))]
    found = specs(rules)  # on a mesh without tp
    assert found["odd"]["kernel"] == P(None, None, "tp")
    assert found["qkv"]["kernel"] == P(None, "fsdp", "tp")
    assert found["out"]["kernel"] == P("tp", "fsdp"), "fsdp is added to what the rule says"
    assert found["out"]["bias"] == P()
    with pytest.raises(ValueError, match="odd/kernel has an axis of 33, which mesh axis tp of 2 does not divide"):
        specs(rules, mesh=(1, 2, 2))


def test_a_rule_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match="sharding rule 'wo/kernel' matches no parameter"):
        specs([("out/kernel", P("fsdp")), ("wo/kernel", P("tp"))])


def test_a_rule_with_more_axes_than_the_leaf_passes_it_by():
    assert specs([("out", P("tp", "fsdp"))])["out"]["bias"] == P()


GENERATOR = Causal(Transformer(layers=2, width=64, heads=4, hidden=128), Label(64)).complete(
    TokenSpec(grid(4, 4), codes=(64,)), Info(classes=10)
)
TOKENIZER = VQGAN(
    size=(16, 16), features=16, mult=(1,), res_blocks=1, latent=16, codes=64, code_features=8, groups=4
)  # fmt: skip


def recipe_of(kind):
    if kind == "generator":
        optim = Optim(lr=1e-2, ema=0.9)
        return generator_recipe(GeneratorStage(steps=5, batch=8, optim=optim, drop=0.3), GENERATOR, TOKENIZER, {})
    losses = Losses(lpips=0.0, adversarial=0.5, adversarial_start=2, judge=PatchGan(16, 2))
    optim = Optim(lr=1e-4, ema=0.9)  # slow enough that rounding tips no latent to another code
    return tokenizer_recipe(TokenizerStage(steps=5, batch=8, optim=optim, losses=losses), TOKENIZER)


def batch_of(kind):
    random = np.random.default_rng(0)
    if kind == "generator":
        tokens, label = random.integers(64, size=(8, 16, 1)), random.integers(10, size=8)
        return {"tokens": tokens.astype(np.int32), "label": label.astype(np.int32)}
    return {"image": random.integers(256, size=(8, 16, 16, 3)).astype(np.uint8)}


@functools.cache
def trained(kind, shape):
    """Losses of five updates, the last state, and the compiled update."""
    mesh, recipe = mesh_of(*shape), recipe_of(kind)
    layout = shard(jax.eval_shape(recipe.init, jax.random.key(0)), mesh, recipe.rules, smallest=64)
    with jax.set_mesh(mesh):
        state = jax.jit(recipe.init, out_shardings=layout)(jax.random.key(0))
        batch = put_batch(batch_of(kind), mesh)
        update = jax.jit(recipe.update, donate_argnums=0, out_shardings=(layout, replicated(mesh)))
        update = update.lower(state, {}, batch, jax.random.key(0)).compile()
        losses = []
        for i in range(5):
            state, metrics = update(state, {}, batch, jax.device_put(jax.random.key(i), replicated(mesh)))
            losses.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return np.array(losses), state, update


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("generator", (8, 1, 1)), ("generator", (1, 8, 1)), ("generator", (2, 2, 2)), ("tokenizer", (2, 2, 2))],
)
def test_training_is_the_same_on_one_device_and_on_eight(kind, shape):
    """To 1e-5 of the loss and 1e-3 of the gradient norm: sums over devices are taken in another order."""
    one, eight = trained(kind, (1, 1, 1))[0], trained(kind, shape)[0]
    if kind == "tokenizer":  # as on 66b0281, when all of its training was one function
        np.testing.assert_allclose(one[[0, 1, 4], 0], [0.54634357, 0.52446169, 0.49399412], rtol=1e-5)
    np.testing.assert_allclose(eight[:, 0], one[:, 0], rtol=1e-5)
    np.testing.assert_allclose(eight[:, 1], one[:, 1], rtol=1e-3)
    assert one[-1, 0] < one[0, 0], "the weights must have moved"


@pytest.mark.parametrize("kind", ["generator", "tokenizer"])
def test_weights_average_and_optimiser_are_split_over_fsdp(kind):
    _, state, _ = trained(kind, (2, 2, 2))
    for tree in (state.params, state.ema, state.opt):
        split = [x for x in jax.tree.leaves(tree) if not x.sharding.is_fully_replicated]
        assert all(x.addressable_shards[0].data.size * 2 <= x.size for x in split)
        assert sum(x.size for x in split) > 0.9 * sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("kind", ["generator", "tokenizer"])
def test_tensor_parallelism_divides_every_product_once_more(kind):
    _, state, _ = trained(kind, (2, 2, 2))
    flat = jax.tree_util.tree_leaves_with_path(state.params["model"])
    both = [
        jax.tree_util.keystr(p, simple=True, separator="/") for p, x in flat if {"tp", "fsdp"} <= set(x.sharding.spec)
    ]
    products = {"generator": "qkv|out|gate|up|down|readout", "tokenizer": r"conv[12]|/[qkv]|proj_out"}[kind]
    assert {p for p in both if re.search(rf"({products})/kernel", p)} == set(both)
    assert len(both) >= {"generator": 6, "tokenizer": 20}[kind]


def test_fsdp_gathers_one_layer_at_a_time():
    """The compiled update gathers parts of parameters, none of them a whole stack of layers."""
    text = trained("generator", (1, 8, 1))[2].as_text()
    gathered = {tuple(map(int, sizes.split(","))) for sizes in re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", text)}
    assert (64, 192) in {sizes[-2:] for sizes in gathered}, "the joint kernel of query, key and value"
    stacks = {
        x.shape for x in jax.tree.leaves(trained("generator", (1, 1, 1))[1].params["model"]["backbone"]["blocks"])
    }
    assert not stacks & gathered


def test_recomputing_changes_no_gradient():
    """To 1e-6 of the largest: the compiler may order sums differently."""
    batch, order = batch_of("generator"), raster(GENERATOR.spec)
    params = GENERATOR.init_params(jax.random.key(0))
    params = params | {
        "head": jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), params["head"])
    }

    def gradient(remat, chunk):
        net = GENERATOR.clone(backbone=GENERATOR.backbone.clone(remat=remat), head=GENERATOR.head.clone(chunk=chunk))

        def loss(params):
            drop = jnp.zeros(8, bool)
            return net.apply({"params": params}, batch["tokens"], batch, order, drop=drop, method="loss")[0].sum()

        return jax.jit(jax.grad(loss))(params)

    want = gradient("none", 0)
    for remat, chunk in (("dots", 0), ("full", 0), ("none", 5)):
        for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(gradient(remat, chunk))):
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-6 * np.abs(a).max())
    with pytest.raises(ValueError, match=r"backbone\.remat is 'some'; it must be one of none, dots, full"):
        gradient("some", 0)


def test_a_batch_is_divided_over_data_and_fsdp():
    batch = put_batch({"x": np.arange(8).reshape(4, 2)}, mesh_of(*FOUR))
    shards = sorted(np.asarray(s.data).tolist() for s in batch["x"].addressable_shards)
    assert shards == [[[0, 1]], [[2, 3]], [[4, 5]], [[6, 7]]]


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 1, 1), (2, 2, 2)])
def test_one_process_reads_every_row(shape):
    assert batch_rows(mesh_of(*shape), 12).tolist() == list(range(12))


def test_a_batch_that_the_mesh_cannot_share_is_refused():
    for batch in (6, 0, -4):
        with pytest.raises(ValueError, match=f"batch is {batch}; it must be a positive multiple of the 4 batch shares"):
            batch_rows(mesh_of(*FOUR), batch)


def test_parts_of_a_batch_cost_no_more_operations_and_less_memory():
    """Four devices, each with its share of every part."""
    tokenizer = VQGAN((16, 16), features=4, mult=(1,), res_blocks=0, latent=4, codes=16, code_features=4, groups=2)
    mesh, images = make_mesh(MeshShape(4, 1, 1), jax.devices()[:4]), np.zeros((32, 16, 16, 3), np.uint8)

    def compiled(accumulate):
        losses, optim = Losses(lpips=0.0, adversarial=0.0), Optim(accumulate=accumulate)
        recipe = tokenizer_recipe(TokenizerStage(batch=32, optim=optim, losses=losses), tokenizer)
        with jax.set_mesh(mesh):
            state = jax.eval_shape(recipe.init, jax.random.key(0))
            update = jax.jit(recipe.update, donate_argnums=0, out_shardings=replicated(mesh))
            done = update.lower(state, {}, put_batch({"image": images}, mesh), jax.random.key(0)).compile()
        work = Program(done.as_text()).work().values()
        return sum(each.flops for each in work), done.memory_analysis().temp_size_in_bytes

    whole, parts = compiled(1), compiled(4)
    assert parts[0] == pytest.approx(whole[0], rel=0.05)
    assert parts[1] < 0.5 * whole[1]


@pytest.mark.parametrize("kind", ["generator", "tokenizer"])
def test_a_preview_divides_its_rows_and_gathers_weights_once(kind):
    """Three images on four devices: one row is drawn for nothing, and is seen in no figure."""
    recipe, batch, frozen = recipe_of(kind), {name: rows[:3] for name, rows in batch_of(kind).items()}, {}
    if kind == "generator":
        small = TOKENIZER.clone(size=(4, 4))
        stage, frozen = GeneratorStage(sampling=Sampling(Interval(2.0))), small.init_params(jax.random.key(1))
        recipe = generator_recipe(stage, GENERATOR, small, {})
    params = jax.jit(recipe.init)(jax.random.key(0)).params["model"]
    alone, figures = jax.jit(recipe.preview)(params, frozen, batch, jax.random.key(2))

    mesh = mesh_of(1, 4, 1)
    layout = shard(params, mesh, smallest=64)
    with jax.set_mesh(mesh):
        rows = put(padded(batch, mesh), batch_sharding(mesh))
        preview = jax.jit(recipe.preview, out_shardings=replicated(mesh))
        arguments = put(params, layout), put(frozen, replicated(mesh)), rows, put(jax.random.key(2), replicated(mesh))
        preview = preview.lower(*arguments).compile()
        pictures, again = preview(*arguments)
    np.testing.assert_array_equal(np.asarray(pictures)[: len(alone)], alone)
    for name, value in figures.items():
        np.testing.assert_allclose(again[name], value, rtol=1e-5, err_msg=name)
    if kind == "generator":
        moved = sum((work.collectives for work in Program(preview.as_text()).work().values()), collections.Counter())
        held = sum(x.nbytes for x in jax.tree.leaves(params))
        assert sum(moved.values()) < 2 * held, "once for all sixteen tokens, and once for the loss"
        caches = set(re.findall(r"\[2,(\d+),4,16,16\]", preview.as_text()))
        assert caches == {"2"}, "of two layers, each device keeps its own image, with and without its label"


def test_rows_that_pad_a_batch_weigh_nothing():
    mesh, images = mesh_of(2, 2, 1), np.arange(6, dtype=np.uint8)[:, None]
    assert padded({"image": images[:4]}, mesh).keys() == {"image"}
    found = padded({"image": images}, mesh)
    assert found["image"][:, 0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    assert found["valid"].tolist() == [1] * 6 + [0] * 2


def test_slices_lie_along_data():
    """Two TPU slices of 2x4 chips, invented: every row of the mesh's data axis is of one slice."""
    kind = {"platform": "tpu", "device_kind": "TPU v5 lite", "core_on_chip": 0}
    chips = [
        types.SimpleNamespace(id=8 * s + i, coords=(i // 4, i % 4, 0), slice_index=s, process_index=s, **kind)
        for s in range(2)
        for i in range(8)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.sharding, "Mesh", lambda placed, *_, **__: placed)
        placed = make_mesh(MeshShape(4, 4, 1), chips)
        with pytest.raises(ValueError, match=r"mesh\.data is 1 on 2 TPU slices; it must be a multiple"):
            make_mesh(MeshShape(1, 16, 1), chips)
    assert placed.shape == (4, 4, 1)
    assert np.vectorize(lambda chip: chip.slice_index)(placed)[..., 0].tolist() == [[0] * 4, [0] * 4, [1] * 4, [1] * 4]
    assert sorted(chip.id for chip in placed.flat) == list(range(16))


class Device:
    def __init__(self, process_index):
        self.process_index = process_index


def batch_part(rows, process, monkeypatch):
    """That of a process, of a batch whose four shares these processes hold."""
    devices = {Device(i): (slice(row, row + 1),) for i, each in enumerate(rows) for row in each}
    held = types.SimpleNamespace(devices_indices_map=lambda shape: devices)
    monkeypatch.setattr(sharding, "batch_sharding", lambda mesh: held)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    return sharding.batch_part(types.SimpleNamespace(shape={"data": 2, "fsdp": 2, "tp": 1}))


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([[0, 1], [2, 3]], [(0, 2), (1, 2)]),
        ([[0, 2], [1, 3]], [(0, 2), (1, 2)]),
        ([[0, 1, 2, 3]] * 2, [(0, 1), (0, 1)]),  # tensor parallelism over hosts
        ([[0, 1], [2, 3]] * 2, [(0, 2), (1, 2)] * 2),
    ],
)
def test_processes_that_hold_the_same_rows_open_the_same_shards(rows, parts, monkeypatch):
    assert [batch_part(rows, process, monkeypatch) for process in range(len(rows))] == parts


def test_processes_that_share_some_of_their_rows_cannot_have_shards_of_their_own(monkeypatch):
    with pytest.raises(ValueError, match="processes share some rows of a batch and not others"):
        batch_part([[0, 1, 2], [2, 3]], 0, monkeypatch)
