import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from jax.sharding import PartitionSpec as P

from ar_jax.config import GeneratorStage
from ar_jax.sharding import MeshShape, make_mesh, put_batch, replicated, shard
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.train.optim import Optim
from ar_jax.train.recipes import generator_recipe

pytestmark = pytest.mark.usefixtures("quick_compile")
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


CASE = CASES["llamagen_label"]
BATCH = {"tokens": CASE.tokens, "label": CASE.batch["label"]}


@functools.cache
def trained(shape):
    """Losses of five updates of a generator, and its last state."""
    mesh = mesh_of(*shape)
    stage = GeneratorStage(steps=5, batch=4, optim=Optim(lr=1e-2, ema=0.9), drop=0.3)
    recipe = generator_recipe(stage, CASE.generator, VQGAN(), {})
    layout = shard(jax.eval_shape(recipe.init, jax.random.key(0)), mesh, smallest=64)
    state = jax.jit(recipe.init, out_shardings=layout)(jax.random.key(0))
    update = jax.jit(recipe.update, donate_argnums=0, out_shardings=(layout, replicated(mesh)))
    losses = []
    for i in range(5):
        state, metrics = update(state, {}, put_batch(BATCH, mesh), jax.random.key(i))
        losses.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return np.array(losses), state


def test_training_is_the_same_on_one_device_and_on_four():
    """To 1e-5 of the loss and 1e-4 of the gradient norm: sums over devices are taken in another order."""
    one, four = trained((1, 1, 1))[0], trained(FOUR)[0]
    np.testing.assert_allclose(four[:, 0], one[:, 0], rtol=1e-5)
    np.testing.assert_allclose(four[:, 1], one[:, 1], rtol=1e-4)
    assert one[-1, 0] < one[0, 0] - 1e-2, "the weights must have moved"


def test_weights_average_and_optimiser_are_split_over_fsdp():
    _, state = trained(FOUR)
    for tree in (state.params, state.ema, state.opt):
        split = [x for x in jax.tree.leaves(tree) if not x.sharding.is_fully_replicated]
        assert split
        assert all(x.addressable_shards[0].data.size * 2 == x.size for x in split)


def test_a_batch_is_divided_over_data_and_fsdp():
    batch = put_batch({"x": np.arange(8).reshape(4, 2)}, mesh_of(*FOUR))
    shards = sorted(np.asarray(s.data).tolist() for s in batch["x"].addressable_shards)
    assert shards == [[[0, 1]], [[2, 3]], [[4, 5]], [[6, 7]]]
