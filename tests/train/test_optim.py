"""Rules of the optimiser, what they keep, and what they begin with."""

import contextlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES

from ar_jax.machine.sharding import MeshShape, make_mesh, shard
from ar_jax.train.checkpoint import Checkpoints
from ar_jax.train.loop import initial
from ar_jax.train.optim import Adafactor, AdamW, Lion, Muon, Optim, decayed, make_optimiser
from ar_jax.train.recipes import Recipe
from ar_jax.train.state import create


@pytest.mark.parametrize(
    ("case", "still"),
    [
        (CASES["llamagen_caption"], {"scale", "bias", "uncond"}),
        (CASES["var_shared"], {"scale", "bias", "q_bias", "v_bias", "table", "start", "position", "level"}),
        (CASES["rar"], {"scale", "bias", "position"}),
    ],
    ids=["llamagen", "var", "rar"],
)
def test_modules_say_what_weight_decay_leaves_alone(case, still):
    may = decayed(case.generator.init_params)
    for path, shrinks in jax.tree_util.tree_leaves_with_path(may):
        assert shrinks == (path[-1].key not in still), path
    tx = make_optimiser(Optim(lr=1.0, weight_decay=0.5), 10, {"model": may})
    params = {"model": case.params}
    unmoved = lambda params: tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)[0]  # noqa: E731
    updates = jax.device_get(jax.jit(unmoved)(params))["model"]
    assert jax.tree.map(lambda update: bool((update != 0).any()), updates) == may


class Vectors(nn.Module):
    """Two parameters of the same name, of which one is declared."""

    no_decay = ("place",)

    @nn.compact
    def __call__(self, x):
        place = self.param("place", nn.initializers.ones, (3,))
        return nn.scan(Kernels, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)(name="inner")(
            x + place, None
        )


class Kernels(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.LayerNorm()(x + self.param("place", nn.initializers.ones, (3,))), None


def test_decay_is_declared_by_the_module_that_has_the_parameter():
    may = decayed(lambda key: Vectors().init(key, jnp.zeros((1, 3)))["params"])
    assert may == {"place": False, "inner": {"place": True, "LayerNorm_0": {"scale": False, "bias": False}}}


RULES = {
    "adamw": AdamW(),
    "adamw_bfloat16": AdamW(moment="bfloat16"),
    "lion": Lion(moment="bfloat16"),
    "adafactor": Adafactor(smallest=4),
    "muon": Muon(moment="bfloat16"),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_every_rule_lowers_a_loss_and_stores_its_first_moment_as_asked(rule):
    random = np.random.default_rng(0)
    target = {
        "blocks": {"kernel": random.normal(size=(2, 8, 4))},
        "head": {"kernel": random.normal(size=(4, 6))},
        "bias": np.ones(6),
    }
    target = {"model": jax.tree.map(np.float32, target)}
    params = jax.tree.map(jnp.zeros_like, target)
    tx = make_optimiser(Optim(lr=0.05, rule=rule, weight_decay=0.0), 100, jax.tree.map(lambda x: True, target))
    loss = lambda params: sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.abs(a - b).sum(), params, target)))  # noqa: E731

    @jax.jit
    def train(params):
        def update(carry, _):
            params, opt = carry
            updates, opt = tx.update(jax.grad(loss)(params), opt, params)
            return (optax.apply_updates(params, updates), opt), None

        return jax.lax.scan(update, (params, tx.init(params)), length=60)[0]

    end, state = train(params)
    assert float(loss(end)) < 0.3 * float(loss(params))
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    first = [leaf for path, leaf in leaves.items() if re.search(r"\.(mu|ema)\b", path) and leaf.ndim]
    assert {leaf.dtype.name for leaf in first} == {rule.moment}
    if isinstance(rule, Adafactor):
        rows = [leaf.shape for path, leaf in leaves.items() if ".v_row" in path and "blocks" in path]
        assert rows == [(2, 8)] or rows == [(2, 4)], "the second moment of a matrix is two vectors"


def test_muon_makes_orthogonal_steps_of_the_size_of_adams():
    """Each of the stacked kernels for itself; readouts and biases move as by AdamW."""
    random = np.random.default_rng(0)
    params = {"model": {"blocks": {"kernel": np.zeros((3, 16, 8))}, "head": {"kernel": np.zeros((8, 4))}}}
    grads = jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), params)
    networks = jax.tree.map(lambda x: True, params)
    steps = []
    for rule in (Muon(steps=10), AdamW()):
        tx = make_optimiser(Optim(lr=1.0, rule=rule, clip=0.0, weight_decay=0.0), 10, networks)
        steps.append(jax.jit(lambda tx=tx: tx.update(grads, tx.init(grads), grads)[0])()["model"])
    (muon, adam), kernels = steps, steps[0]["blocks"]["kernel"]
    np.testing.assert_allclose(muon["head"]["kernel"], adam["head"]["kernel"], rtol=1e-6)
    singular = np.linalg.svd(kernels, compute_uv=False)
    assert singular.min() > 0.5 * singular.max()
    assert float(jnp.sqrt(jnp.square(kernels).mean())) == pytest.approx(0.2, rel=0.3)


def test_parameters_that_are_not_trained_have_no_moments_and_stay_where_they_are():
    params = {"model": {"mask": {"kernel": jnp.ones((3, 2))}, "net": {"kernel": jnp.ones((3, 2))}}}
    optim = Optim(lr=1.0, weight_decay=0.5, trained=("^/mask",))
    tx = make_optimiser(optim, 10, jax.tree.map(lambda x: True, params))
    state = tx.init(params)
    moments = [jax.tree_util.keystr(path) for path, x in jax.tree_util.tree_leaves_with_path(state) if jnp.ndim(x)]
    assert len(moments) == 2
    assert all("mask" in name for name in moments)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    assert not updates["model"]["net"]["kernel"].any()
    np.testing.assert_allclose(
        updates["model"]["mask"]["kernel"], -1.5, rtol=1e-5
    )  # decay too, by the path in the network


def old_optimiser(networks=("model",)):
    """As versions wrote it that had no parts."""
    one = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.constant_schedule(1e-3), 0.9, 0.95, weight_decay=0.05, mask=lambda x: True),
    )
    return optax.partition({name: one for name in networks}, {name: name for name in networks})


def test_checkpoints_of_earlier_versions_go_on(tmp_path):
    params = {"model": {"mask": {"kernel": jnp.ones((3, 2))}, "net": {"kernel": jnp.ones((3, 2))}}}
    every = jax.tree.map(lambda x: True, params)
    old = create(params, {}, old_optimiser(), 0.0)
    old = old.replace(step=jnp.int32(1), opt=jax.tree.map(lambda x: x + jnp.ones((), x.dtype), old.opt))
    assert jax.tree.structure(make_optimiser(Optim(), 10, every).init(params)) == jax.tree.structure(old.opt)
    mesh = make_mesh(MeshShape(1), jax.devices()[:1])

    def restored(**settings):
        tx = make_optimiser(Optim(**settings), 10, every)
        like = jax.eval_shape(lambda: create(params, {}, tx, 0.0))
        return checkpoints.restore(like, shard(like, mesh))[0]

    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(old, {})
        checkpoints.wait()
        jax.tree.map(np.testing.assert_array_equal, restored().opt, old.opt)
        some = {
            jax.tree_util.keystr(path): x
            for path, x in jax.tree_util.tree_leaves_with_path(restored(trained=("^/mask",)).opt)
        }
        assert sum("kernel" in name for name in some) == 2
        assert all(bool((x == 1).all()) for x in some.values())
        with pytest.raises(ValueError, match="is not part of the configured model"):
            restored(rule=Lion())


def test_fine_tuning_begins_in_the_memory_of_what_it_begins_with():
    """Parameters that are read become the state's own, those that are not are drawn."""
    tx = make_optimiser(Optim(), 10, {"model": {"a": True, "b": True, "c": True}})
    draw = lambda key: {"model": {name: jax.random.normal(key, (64, 64)) for name in "abc"}}  # noqa: E731
    recipe = Recipe(lambda key: create(draw(key), {}, tx, 0.5), None, None, None, {}, None)
    given = {name: jnp.full((64, 64), value) for value, name in enumerate("ab")}
    where = {name: leaf.unsafe_buffer_pointer() for name, leaf in given.items()}
    shapes = jax.eval_shape(recipe.init, jax.random.key(0))
    layout = shard(shapes, make_mesh(MeshShape(1), jax.devices()[:1]))
    state = initial(recipe, shapes, layout, jax.random.key(0), lambda like: like | given, alike=(("c", "b"),))
    assert all(leaf.is_deleted() for leaf in given.values())
    model = state.params["model"]
    assert {model["a"].unsafe_buffer_pointer()} <= set(where.values())
    assert [float(leaf.mean()) for leaf in model.values()] == [0, 1, 1]
    jax.tree.map(np.testing.assert_array_equal, state.ema, model)
    fresh = initial(recipe, shapes, layout, jax.random.key(0), lambda like: like | {"b": jnp.ones((64, 64))})
    np.testing.assert_array_equal(fresh.params["model"]["a"], draw(jax.random.key(0))["model"]["a"])


def test_parts_begin_as_others_and_of_more_layers_as_the_last_ones():
    layers = {"net": {"blocks": jnp.arange(12.0).reshape(3, 4), "norm": jnp.ones(4)}, "a": {"blocks": jnp.zeros((2, 4))}}
    model = layers | {"b": {"scale": jnp.zeros(())}, "c": {"scale": jnp.ones(())}}
    model |= {name: {"table": jnp.zeros((rows, 4)), "bias": jnp.zeros(4)} for name, rows in (("few", 5), ("many", 7))}
    tx = optax.sgd(1.0)
    recipe = Recipe(lambda key: create({"model": model}, {}, tx, 0.0), None, None, None, {}, None)
    shapes = jax.eval_shape(recipe.init, jax.random.key(0))
    layout = shard(shapes, make_mesh(MeshShape(1), jax.devices()[:1]))

    def began(*alike):
        return initial(recipe, shapes, layout, jax.random.key(0), lambda like: like, alike).params["model"]

    found = began(("b", "c"), ("a", "net"))
    assert found["b"]["scale"] == 1
    np.testing.assert_array_equal(found["a"]["blocks"], np.arange(4, 12).reshape(2, 4))
    for wrong in (("a", "c"), ("net", "a"), ("d", "a"), ("few", "many"), ("few/table", "many/table")):
        with pytest.raises(ValueError, match=r"no two equal parts; it has \('net', 'a', 'b', 'c', 'few', 'many'\)"):
            began(wrong)


def test_betas_may_be_given_beside_the_rule():
    """As configs of before there were rules have them."""
    assert Optim(betas=(0.9, 0.96)) == Optim(rule=AdamW((0.9, 0.96)))
    assert Optim(rule=Lion(), betas=(0.9, 0.96)).rule == Lion((0.9, 0.96))
    with pytest.raises(ValueError, match=r"optim\.betas is \(0\.9, 0\.96\), but Adafactor has none"):
        Optim(rule=Adafactor(), betas=(0.9, 0.96))
