"""What holds for FlowAR and xAR, whatever the groups of tokens.

Images are equal up to rounding: the products of a batch, of a shard and of a single image differ in their last digits.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases_flow import CASES, GRID, PYRAMID
from trees import initial_params, never_moved

from ar_jax.decode.sampling import Sampling
from ar_jax.decode.sequential import Sequential, Task
from ar_jax.files import codec
from ar_jax.generators.base import Knobs
from ar_jax.generators.block_flow import Until
from ar_jax.generators.causal import Causal
from ar_jax.generators.masked import Masked
from ar_jax.heads.diffusion import Diffusion
from ar_jax.heads.integrate import integrate, schedule
from ar_jax.heads.joint_flow import two_speeds
from ar_jax.machine.sharding import MeshShape, batch_sharding, make_mesh, shard
from ar_jax.nets.conditioning import fold, paired, widen
from ar_jax.nets.gated import Condition
from ar_jax.orders import Cells, Interleaved, raster, to_ranks
from ar_jax.tokenizers.kl_vae import KLVAE
from ar_jax.tokenizers.latent_pyramid import LatentPyramid
from ar_jax.tokens import TokenSpec, grid, maps

CLOSE = {"rtol": 2e-3, "atol": 2e-3}


def each(*names):
    return pytest.mark.parametrize("case", [CASES[name] for name in names], ids=names)


def knobs(steps):
    return Knobs(np.linspace(1, 2, steps, dtype=np.float32), np.full(steps, 0.9, np.float32))


def image_keys(count):
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(5)))(jnp.arange(count))


def rank_keys(count, ranks):
    return jax.vmap(lambda key: jax.vmap(functools.partial(jax.random.fold_in, key))(ranks))(image_keys(count))


@functools.cache
def sampler(case, segments):
    order = case.ordered()

    @jax.jit
    def run(params, batch, keys):
        task = Task(case.generator, params, batch, order, knobs(len(order.sizes)), keys, True, case.tokenizer)
        return Sequential(segments)(task)[0]

    return run


def sampled(case, images=slice(None), segments=1):
    batch = jax.tree.map(lambda x: x[images], case.batch)
    return np.asarray(sampler(case, segments)(case.params, batch, image_keys(case.images)[images]))


def guided_condition(case):
    drop, call = jnp.zeros(case.images, bool), functools.partial(case.generator.apply, {"params": case.params})
    return paired(*(call(case.batch, drop ^ without, method="condition") for without in (False, True)))


@each("flowar", "flowar_cross", "xar_tokens", "xar_cells", "xar_whole")
def test_tokens_are_finite_and_differ(case):
    tokens = sampled(case)
    assert tokens.shape == case.tokens.shape
    assert np.isfinite(tokens).all()
    assert len(np.unique(tokens)) > 0.98 * tokens.size


@each("flowar", "xar_tokens")
def test_an_image_does_not_depend_on_its_neighbours(case):
    np.testing.assert_allclose(sampled(case, slice(3, 4)), sampled(case)[3:4], **CLOSE)


@each("xar_tokens")
def test_a_growing_cache_draws_the_same(case):
    np.testing.assert_allclose(sampled(case, segments=3), sampled(case), **CLOSE)


@pytest.mark.parametrize(
    ("name", "shape"), [("flowar_cross", MeshShape(2, 1, 2)), ("xar_cells", MeshShape(2, 2, 1))]
)  # fmt: skip
def test_images_are_the_same_on_four_devices_with_sharded_weights(name, shape):
    case = CASES[name]
    mesh = make_mesh(shape, jax.devices()[:4])
    params = jax.device_put(case.params, shard(case.params, mesh, case.generator.rules, smallest=16))
    batch, keys = jax.device_put((case.batch, image_keys(case.images)), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(sampler(case, 1)(params, batch, keys), sampled(case), **CLOSE)


def test_tensor_parallelism_divides_networks_and_head():
    case = CASES["flowar_cross"]
    params = shard(case.params, make_mesh(MeshShape(1, 1, 2), jax.devices()[:2]), case.generator.rules)
    divided = {
        jax.tree_util.keystr(path, simple=True, separator="/").rsplit("/", 1)[0]
        for path, where in jax.tree_util.tree_leaves_with_path(params)
        if not where.is_fully_replicated
    }
    parts = {"attention/qkv", "attention/out", "mlp/gate", "mlp/up", "mlp/down"}
    cross = {f"cross_attention/{part}" for part in ("q", "kv", "out")}
    stacks = {f"backbone/{stack}/blocks/{part}" for stack in ("encoder", "decoder") for part in parts}
    assert stacks | {f"head/net/blocks/{part}" for part in parts | cross} <= divided


@each("flowar")
def test_rows_see_coarser_scales_only(case):
    order = case.ordered()
    level = PYRAMID.spec.coords[:, 0]
    cond = guided_condition(case)
    hidden = jax.jit(
        lambda tokens: case.generator.apply(
            {"params": case.params}, widen(tokens, 2), cond, order, case.tokenizer, method="hidden"
        )
    )
    before, after = hidden(case.tokens), hidden(case.tokens + (level == 2)[:, None])
    np.testing.assert_array_equal(before[:, level <= 2], after[:, level <= 2])
    assert (np.abs(before - after)[:, level > 2].max((1, 2)) > 1e-4).all(), "finer rows must see the change"


@each("flowar_cross")
def test_cached_sampling_equals_a_redraw_from_the_teacher_forced_pass(case):
    tokens, order = jnp.asarray(sampled(case)), case.ordered()
    cond, steps = guided_condition(case), len(order.sizes)

    def redraw(self):
        h, first, parts = self.hidden(widen(tokens, 2), cond, order, case.tokenizer), 0, []
        for i, size in enumerate(order.sizes):
            keys = rank_keys(case.images, first + jnp.arange(size))
            parts.append(self.head.sample(h[:, first : first + size], keys, knobs(steps), i))
            first += size
        return jnp.concatenate(parts, axis=1)

    got = jax.jit(lambda params: case.generator.apply({"params": params}, method=redraw))(case.params)
    np.testing.assert_allclose(got, tokens, **CLOSE)


@each("flowar", "flowar_cross")
def test_tokens_of_a_scale_see_one_another_on_their_way_and_no_other_scale(case):
    head, level = case.generator.head, PYRAMID.spec.coords[:, 0]
    h = jnp.asarray(np.random.default_rng(0).normal(size=(2, len(level), 16)), jnp.float32)
    noise = jnp.asarray(np.random.default_rng(1).normal(size=(2, 1, len(level), 4)), jnp.float32)
    t = jnp.full((2, 1, len(PYRAMID.scales)), 0.6)
    run = jax.jit(
        lambda noise, t: head.apply({"params": case.params["head"]}, h, 0 * noise[:, 0], t, noise, method="errors")
    )
    base, other = run(noise, t), run(noise.at[:, :, -1].add(1.0), t)
    changed = np.abs(base - other)[:, 0] > 1e-6
    assert not changed[:, level < 3].any()
    assert changed[:, level == 3].all()
    later = np.abs(run(noise, t.at[..., 3].set(0.2)) - base)[:, 0] > 1e-6
    assert not later[:, level < 3].any()
    assert later[:, level == 3].all()


@each("xar_tokens", "xar_interleaved", "xar_scales")
def test_groups_see_themselves_and_earlier_ones_only(case):
    order, generator = case.ordered(), case.generator
    x, t = to_ranks(case.tokens, order), jnp.full((case.images, len(order.sizes)), 0.5)
    cond = generator.apply({"params": case.params}, case.batch, jnp.zeros(case.images, bool), method="condition")
    run = jax.jit(
        lambda x, t: generator.apply({"params": case.params}, x, t, cond, order, 0, method="velocity")[0]
    )  # fmt: skip
    group = len(order.sizes) // 2
    inside = order.step == group
    before = run(x, t)
    for after in (run(x + inside[:, None], t), run(x, t.at[:, group].set(0.9))):
        np.testing.assert_array_equal(before[:, order.step < group], after[:, order.step < group])
        assert (np.abs(before - after)[:, order.step >= group].max(-1) > 1e-6).all()


@each("xar_tokens", "xar_cells")
def test_cached_sampling_equals_a_recomputation_without_cache(case):
    order, generator = case.ordered(), case.generator
    tokens, cond = to_ranks(jnp.asarray(sampled(case)), order), guided_condition(case)
    steps, knob = len(order.sizes), knobs(len(order.sizes))
    noise = functools.partial(generator.apply, {"params": case.params}, method="noise")

    def redraw(tokens, i, first, size):
        keys = rank_keys(case.images, first + jnp.arange(size))
        times, count = schedule(generator.grid, generator.anneal, generator.steps, generator.last_steps, steps, i)

        def velocity(x, t):
            everything = tokens.at[:, first : first + size].set(x)
            all_times = jnp.where(jnp.arange(steps) == i, t, 0.0)[None]
            v, _ = generator.apply(
                {"params": case.params}, widen(everything, 2), all_times, cond, order, 0, method="velocity"
            )
            return fold(v[:, first : first + size], 2, knob.guidance[i])

        start, more = 0.9 * noise(keys, 0), lambda s: 0.9 * noise(keys, s + 1)
        return integrate(velocity, start, times, solver=generator.solver, noise=more, steps=count)

    first = 0
    for i, size in list(enumerate(order.sizes))[:3]:
        unknown = jnp.where(jnp.arange(order.n)[:, None] >= first, 1e3, tokens)  # what is unknown is not read
        got = jax.jit(functools.partial(redraw, i=i, first=first, size=size))(unknown)
        np.testing.assert_allclose(got, tokens[:, first : first + size], **CLOSE)
        first += size


@each("flowar_cross", "xar_scales")
def test_loss_falls_and_every_parameter_moves(case):
    generator, tx, order = case.generator, optax.adam(5e-3), case.ordered()
    drop = jnp.array([False, True] * (case.images // 2))

    @jax.jit
    def update(params, opt, key):
        def loss_fn(params):
            loss, weight, _ = generator.apply(
                {"params": params}, case.tokens, case.batch, order, drop=drop, key=key, tokenizer=case.tokenizer,
                method="loss", rngs={"dropout": key},
            )  # fmt: skip
            return (loss * weight).sum() / weight.sum()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, loss

    first = params = initial_params(generator)
    opt, losses = jax.jit(tx.init)(params), []
    for step in range(40):
        params, opt, loss = update(params, opt, jax.random.key(step))
        losses.append(float(loss))
        if step == 4:
            still = never_moved(first, params)
            assert not still
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:3])


def test_dropout_leaves_out_weights_of_the_attention_and_of_the_rows():
    case = CASES["xar_cells"]
    plain, order = case.generator, case.ordered()

    @functools.partial(jax.jit, static_argnums=0)
    def mean(generator, rngs):
        return generator.apply(
            {"params": case.params}, case.tokens, case.batch, order, drop=jnp.zeros(4, bool), key=jax.random.key(0),
            method="loss", rngs=rngs,
        )[0].mean()  # fmt: skip

    def loss(generator, seed):
        return float(mean(generator, {} if seed is None else {"dropout": jax.random.key(seed)}))

    for rates in ({"dropout": 0.5}, {"attention_dropout": 0.5}):
        dropping = plain.clone(backbone=plain.backbone.clone(**rates))
        assert loss(dropping, None) == loss(plain, None)
        assert len({loss(dropping, 0), loss(dropping, 1), loss(plain, None)}) == 3


def test_groups_by_hand():
    spec = TokenSpec(grid(4, 4), channels=1)
    cells = Cells(2)(spec)
    assert cells.sizes == (4, 4, 4, 4)
    assert cells.slot[0, :8].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert Interleaved(2)(spec).slot[0, :8].tolist() == [0, 2, 8, 10, 1, 3, 9, 11]
    border = Cells(2)(GRID)  # 3 x 4
    assert (border.sizes, border.slot[0, 8:].tolist()) == ((4, 4, 2, 2), [8, 9, 10, 11])
    np.testing.assert_array_equal(Cells(1)(GRID).slot, raster(GRID).slot)


def test_published_times():
    n25 = "1000 936 872 809 745 681 618 554 490 427 363 300 250 229 208 187 166 145 125 104 83 62 41 20"
    n15 = "1000 883 766 650 533 416 300 250 214 178 142 107 71 35"
    for steps, want in ((25, n25), (15, n15)):
        times, count = schedule(two_speeds, "constant", steps, 15, 5, 0)
        assert count == len(times) - 1 == 2 * (steps // 2)
        assert np.floor(times[:-1] * np.float32(1000)).astype(int).tolist() == [int(x) for x in want.split()]
    np.testing.assert_allclose(two_speeds(50), np.linspace(1, 0, 51))
    with pytest.raises(ValueError, match=r"head\.steps is 1; with this grid it must be at least 2"):
        two_speeds(1)
    n40 = "1000 975 950 926 901 876 852 827 803 778"
    times, count = schedule(Until(0.04), "constant", 40, 15, 4, 0)
    assert (count, times[-1]) == (40, 0)
    assert np.floor(times[:10] * np.float32(1000)).astype(int).tolist() == [int(x) for x in n40.split()]
    counts = [schedule(Until(), "linear", 50, 15, 4, s)[1] for s in range(4)]
    assert counts == [50, 38, 26, 15]
    assert [schedule(two_speeds, "linear", 50, 15, 5, k)[1] for k in range(5)] == [50, 40, 32, 22, 14]


def test_schedules_of_a_traced_step_are_those_of_a_given_one():
    traced = jax.jit(lambda i: schedule(Until(), "linear", 7, 3, 4, i))
    for i in range(4):
        (times, count), (want, known) = traced(jnp.int32(i)), schedule(Until(), "linear", 7, 3, 4, i)
        assert int(count) == known
        np.testing.assert_allclose(times[: known + 1], want[: known + 1])


def test_a_condition_is_spread_over_its_rows():
    y = jnp.arange(6.0).reshape(1, 3, 2)
    np.testing.assert_array_equal(Condition(y, (1, 2, 2)).spread(y)[0, :, 0], [0, 2, 2, 4, 4])
    assert Condition(y).spread(y) is y


def test_a_latent_pyramid_averages_its_base_and_decodes_the_last_scale():
    image = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 6, 6, 3)), jnp.float32)
    tokens = PYRAMID.apply({}, image, method="encode")
    base = PYRAMID.base.apply({}, image, method="encode")
    one, _, _, last = maps(tokens, PYRAMID.scales)
    np.testing.assert_allclose(one[:, 0, 0], base.mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(last.reshape(base.shape), base)
    np.testing.assert_allclose(
        PYRAMID.apply({}, tokens, method="decode"), PYRAMID.base.apply({}, base, method="decode")
    )
    context = maps(PYRAMID.apply({}, tokens, method="context"), PYRAMID.scales)
    assert not np.any(context[0])
    np.testing.assert_allclose(context[1], jnp.broadcast_to(one, context[1].shape), rtol=1e-5, atol=1e-6)
    with pytest.raises(
        ValueError, match=r"tokenizer\.scales is \(1, 2\), but its last one must be the base's \(3, 3\)"
    ):
        PYRAMID.clone(scales=(1, 2)).spec  # noqa: B018
    measured = PYRAMID.clone(shift=(0.5,), scale=(2.0,))
    np.testing.assert_allclose(measured.apply({}, image, method="encode"), 2 * (tokens - 0.5), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        measured.apply({}, 2 * (tokens - 0.5), method="decode"), PYRAMID.apply({}, tokens, method="decode"), atol=1e-5
    )


def test_annealing_is_a_field_of_the_model_that_sampling_may_change():
    def annealed(owner):
        values = {"anneal": "linear", "steps": 50, "last_steps": 15}
        return Sampling(fields=tuple((f"{owner}.{name}", value) for name, value in values.items()))

    for name, owner, part in (("flowar", "generator.head", lambda g: g.head), ("xar_cells", "generator", lambda g: g)):
        case = CASES[name]
        changed = part(annealed(owner).adapted(case.generator, case.pyramid, case.order)[0])
        assert (changed.anneal, changed.steps, changed.last_steps) == ("linear", 50, 15)
        assert Sampling().adapted(case.generator, case.pyramid, case.order)[0] == case.generator
    for steps, want in (("100", ("50", 950)), ("ddim100", ("ddim50", 980))):
        mar = Masked(None, None, None, Diffusion(steps=steps))
        head = annealed("generator.head").adapted(mar, None, raster)[0].head
        assert (head.anneal, head.steps, head.latest, head.last_steps) == ("linear", *want, 15)
    few = Sampling(fields=(("generator.head.steps", "20"),))
    assert few.adapted(mar, None, raster)[0].head.latest == 1000
    with pytest.raises(ValueError, match=r"generator.head.anneal cannot be changed in sampling; of this model these can"):
        annealed("generator.head").adapted(Causal(None, None), None, raster)


@each("flowar_cross", "xar_tokens")
def test_calls_are_counted_as_the_loops_make_them(case):
    order = case.ordered()
    calls = case.generator.calls(order)
    counts = [schedule(p.grid, p.anneal, p.steps, p.last_steps, len(order.sizes), i)[1]
              for p in [getattr(case.generator, "head", case.generator)] for i in range(len(order.sizes))]  # fmt: skip
    if "head" in calls:
        assert calls["head"].tolist() == counts
        assert calls["generator"].tolist() == [1] * len(order.sizes)
    else:  # the clean group goes through the network once more, but for the last
        assert calls["generator"].tolist() == [count + 1 for count in counts[:-1]] + [counts[-1]]


def test_a_latent_pyramid_has_the_parameters_of_its_base():
    base = KLVAE((8, 8), features=4, mult=(1, 2), res_blocks=1, latent=2, groups=2)
    module, image = LatentPyramid(base, (1, 2, 4)), jnp.linspace(-1, 1, 192).reshape(1, 8, 8, 3)
    params = initial_params(module)
    inside = jax.eval_shape(functools.partial(base.init, method="autoencode"), jax.random.key(0), image)["params"]
    assert jax.tree.structure(params) == jax.tree.structure(inside)

    @jax.jit
    def run(params):
        tokens, want = (net.apply({"params": params}, image, method="encode") for net in (module, base))
        recon, _, _ = module.apply({"params": params}, image, method="autoencode")
        return tokens, want, recon, module.apply({"params": params}, tokens, method="decode")

    tokens, want, recon, decoded = run(params)
    np.testing.assert_allclose(tokens[:, 5:], want, atol=1e-5)
    np.testing.assert_allclose(decoded, recon, atol=1e-5)
    assert codec.encode(codec.decode(codec.encode(module), nn.Module)) == codec.encode(module)
