"""DQ-Transformer: sequences of two densities, that drawing is what the forced pass says, and what does not fit."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import random_params

from ar_jax.data import Info
from ar_jax.decode.guidance import Interval
from ar_jax.decode.logits import Filter
from ar_jax.decode.sampling import Sampling
from ar_jax.decode.sequential import Task, keys_of
from ar_jax.decode.temperature import Constant
from ar_jax.generators.base import Knobs, Setting, Step
from ar_jax.generators.dq_transformer import DQTransformer, Items, Sequence, StartClass
from ar_jax.machine.sharding import MeshShape, batch_sharding, make_mesh, shard
from ar_jax.nets.vit import Successive
from ar_jax.orders import raster
from ar_jax.tokens import TokenSpec, grid, pyramid

CODES, CELLS, PLACES = 7, 4, 16
SPEC = TokenSpec(pyramid((2, 4)), codes=(CODES + 1,))
NETS = Successive(1, 8, 2), Successive(1, 8, 2)
GENERATOR = DQTransformer(*NETS, StartClass(8)).complete(SPEC, Info(classes=3))
BATCH = {"label": np.array([0, 1, 2, 1], np.int32)}


def tokens_of(fine):
    """Of images whose cells are fine where it says so, [b 2 2]."""
    random, fine = np.random.default_rng(0), np.asarray(fine, bool)
    places = fine.repeat(2, 1).repeat(2, 2).reshape(len(fine), -1)
    here = np.concatenate([~fine.reshape(len(fine), -1), places], axis=1)
    return np.where(here, random.integers(CODES, size=here.shape), CODES).astype(np.int32)[..., None]


TOKENS = tokens_of([np.zeros((2, 2)), np.ones((2, 2)), [[0, 1], [0, 0]], [[1, 0], [1, 1]]])


@pytest.mark.parametrize(("regions", "room", "again"), [(False, 0, True), (True, 5, False)])
def test_a_sequence_has_all_codes_with_their_places_and_gives_the_tokens_back(regions, room, again):
    generator = GENERATOR.clone(regions=regions, room=room, again=again)
    items, restored = jax.jit(lambda x: (found := generator.sequence(x), generator.restored(found)))(TOKENS)
    np.testing.assert_array_equal(restored, TOKENS)
    content, place, fine = map(np.asarray, items)
    assert content.shape == (4, 1 + max(room, 1) + again + PLACES + 1)
    for i, (coarse, more) in enumerate(((4, 0), (0, 16), (3, 4), (1, 12))):
        whole = max(coarse + 1, room)
        want = [[CODES + 2], [0] * coarse, [CODES + 1], [CODES] * (whole - coarse - 1)]
        want += [[CODES + 2] * again, [0] * more, [CODES + 1]]
        want = np.concatenate(want).astype(int)
        kind = np.where(content[i] < CODES, 0, content[i])
        np.testing.assert_array_equal(kind[: len(want)], want)
        assert (kind[len(want) :] == CODES).all(), "what follows is padding"
        np.testing.assert_array_equal(fine[i], np.arange(len(fine[i])) > whole)
    row = [0, 1, 2, 3, 4] if not regions else [0, 1, 4, 5, 2]
    np.testing.assert_array_equal(place[1, 1 + max(room, 1) + again :][:5], row)


@functools.cache
def stepped(given, again, room):
    """Jitted: parameters, batch, keys of images -> tokens, the items as they were drawn, logits of the forced pass on them."""
    generator = GENERATOR.clone(given=given, again=again, room=room, top_places=0)
    order = Items(generator.length - 1 - PLACES)(SPEC)
    steps = generator.length - 1
    knobs = Knobs(jnp.ones(steps), jnp.zeros(steps))

    def run(self, batch, keys):
        cond = self.condition(batch, jnp.zeros(len(keys), bool))
        setting = Setting(cond, order, knobs)
        state = self.grow(self.begin(setting, len(keys)), order.n, setting)

        def step(self, state, i):
            state = self.step(state, Step(i, i, keys_of(keys, i[None])), setting)
            return state, state.item

        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        start = state.item
        state, items = scan(self, state, jnp.arange(steps))
        items = Sequence(*(jnp.concatenate([a, jnp.moveaxis(b, 0, 1)[..., 0]], axis=1) for a, b in zip(start, items)))
        return state.tokens, items, self.forced(items, cond)

    return jax.jit(lambda params, batch, keys: generator.apply({"params": params}, batch, keys, method=run))


@pytest.mark.parametrize(("given", "again", "room"), [(True, True, 0), (False, False, 3)])
def test_drawing_takes_what_the_forced_pass_says_and_leaves_no_hole(given, again, room):
    params, keys = random_params(GENERATOR.clone(again=again, room=room), 0.7), jax.random.split(jax.random.key(1), 4)
    kernel = params["place_readout"]["kernel"]
    params["place_readout"]["kernel"] = kernel.at[:, CELLS + 1].set(0)  # some cells are likelier than the end
    tokens, items, (of_places, of_contents) = stepped(given, again, room)(params, BATCH, keys)
    tokens, (content, place, fine) = np.asarray(tokens)[..., 0], map(np.asarray, items)
    cells, places = tokens[:, :CELLS] < CODES, tokens[:, CELLS:].reshape(-1, 2, 2, 2, 2) < CODES
    np.testing.assert_array_equal(places.sum((2, 4)), np.where(cells.reshape(-1, 2, 2), 0, 4))
    assert cells.any()
    assert places.any()
    real = content < CODES
    np.testing.assert_array_equal(
        np.asarray(of_contents)[..., :CODES].argmax(-1)[real[:, 1:]], content[:, 1:][real[:, 1:]]
    )
    coarse_ends = ~fine & (content == CODES + 1)
    np.testing.assert_array_equal(coarse_ends.sum(1), 1)
    for i in range(4):
        used = []
        for t in range(1, place.shape[1]):
            if not fine[i, t] and (real[i, t] or coarse_ends[i, t]):
                allowed = np.full(of_places.shape[-1], -np.inf)
                left = [j for j in (*range(CELLS), CELLS + 1) if j not in used]
                allowed[left] = np.asarray(of_places)[i, t - 1, left]
                assert place[i, t] == allowed.argmax()
                used.append(place[i, t])
    if given:
        rows = [place[i][fine[i] & real[i]] for i in range(4)]
        assert all((np.diff(row) > 0).all() for row in rows), "fine places come in order"
    other = np.array([2, 0, 3, 1])
    moved = stepped(given, again, room)(params, {"label": BATCH["label"][other]}, keys[other])[0]
    np.testing.assert_array_equal(np.asarray(moved)[..., 0], tokens[other])


def test_guided_images_are_the_same_on_four_devices_with_sharded_weights():
    params, keys = random_params(GENERATOR, 0.5), jax.random.split(jax.random.key(1), 4)
    order = Items()(SPEC)
    generator, params = GENERATOR.unrolled(params)
    sampling = Sampling(Interval(1.7), Constant(0.9), Filter(top_k=5))

    @jax.jit
    def run(params, batch, keys):
        return sampling.tokens(generator, params, batch, order, keys=keys)[0]

    alone = np.asarray(run(params, BATCH, keys))
    mesh = make_mesh(MeshShape(2, 1, 2), jax.devices()[:4])
    divided = jax.device_put(params, shard(params, mesh, generator.rules, smallest=16))
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(divided))
    batch, keys = jax.device_put((BATCH, keys), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(run(divided, batch, keys), alone)
    assert len(np.unique(alone[..., 0], axis=0)) == 4


def test_the_loss_reaches_every_parameter_and_a_dropped_class_is_not_seen():
    params = random_params(GENERATOR, 0.5)

    def loss(params, batch, drop):
        each, weight, _ = GENERATOR.apply({"params": params}, TOKENS, batch, raster(SPEC), drop=drop, method="loss")
        return (each * weight).sum() / weight.sum()

    value = jax.jit(jax.value_and_grad(loss))
    _, grads = value(params, BATCH, jnp.array([False, True, False, False]))
    still = [jax.tree_util.keystr(path) for path, x in jax.tree_util.tree_leaves_with_path(grads) if not np.any(x)]
    assert not still
    for name, pad in (("content", CODES), ("coarse", CELLS), ("fine", PLACES)):
        assert not np.any(grads[name][pad]), "padding learns nothing"
    none, other = jnp.ones(4, bool), {"label": (BATCH["label"] + 1) % 3}
    assert value(params, BATCH, none)[0] == value(params, other, none)[0]
    assert value(params, BATCH, ~none)[0] != value(params, other, ~none)[0]


def test_what_does_not_fit_is_refused():
    info = Info(classes=3)
    for spec in (TokenSpec(grid(2, 2), codes=(8,)), TokenSpec(pyramid((2, 3)), codes=(8,))):
        with pytest.raises(
            ValueError, match=r"DQTransformer needs one code a token on a coarse grid and one twice as fine"
        ):
            DQTransformer(*NETS, StartClass(8)).complete(spec, info)
    with pytest.raises(ValueError, match=r"generator\.conditioning\.width is 4; it must be 8, that of places"):
        DQTransformer(*NETS, StartClass(4)).complete(SPEC, info)
    with pytest.raises(ValueError, match=r"generator\.room is 6, but the coarse part has at most 5 items"):
        DQTransformer(*NETS, StartClass(8), room=6).complete(SPEC, info)
    with pytest.raises(ValueError, match=r"generator\.rows is 3, but sequences have 19; give as many, or 0"):
        DQTransformer(*NETS, StartClass(8), rows=3).complete(SPEC, info)
    with pytest.raises(ValueError, match=r"order\.extra is 5, but 4 cells and 16 places leave 4 ranks for it at most"):
        Items(5)(SPEC)
    params = random_params(GENERATOR, 0.5)

    def drawn(order, source=None):
        knobs = Sampling(filter=Filter(top_k=3)).knobs(order, SPEC)
        task = Task(GENERATOR, params, BATCH, order, knobs, jax.random.split(jax.random.key(0), 4), source=source)
        return jax.eval_shape(lambda: task.begin(task.setting()))

    with pytest.raises(ValueError, match=r"the order draws 18 items, but sequences have 19; give order Items\(3\)"):
        drawn(Items(2)(SPEC))
    with pytest.raises(ValueError, match=r"DQTransformer cannot keep a part of an image"):
        drawn(Items(3)(SPEC), source="tokens")
