"""What holds for every method of continuous tokens; the laws of codes are in `test_laws.py`.

Images are equal up to rounding: the products of a batch, of a shard and of a single image differ in their last digits.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases_continuous import CASES, MASKED, SPEC
from trees import initial_params, never_moved

from ar_jax.decode.edit import Source
from ar_jax.decode.sequential import Sequential, Task
from ar_jax.generators.base import Knobs, Step
from ar_jax.machine.sharding import MeshShape, batch_sharding, make_mesh, shard
from ar_jax.nets.conditioning import paired, widen
from ar_jax.orders import Order, cosine_sizes, known_first, rooms, to_ranks

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_masked = pytest.mark.parametrize("case", MASKED.values(), ids=MASKED.keys())
CLOSE = {"rtol": 2e-3, "atol": 2e-3}


def knobs(steps):
    return Knobs(np.linspace(1, 2, steps, dtype=np.float32), np.full(steps, 0.9, np.float32))


def image_keys(count):
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(5)))(jnp.arange(count))


@functools.cache
def sampler(case, sizes, rooms, unroll, segments):
    generator = case.generator.unrolled(case.params)[0] if unroll else case.generator

    @jax.jit
    def run(params, batch, slot, keys):
        order = Order(slot, sizes, rooms)
        return Sequential(segments)(Task(generator, params, batch, order, knobs(len(sizes)), keys, True))[0]

    return run


def sampled(case, order=None, images=slice(None), unroll=False, segments=1):
    order = order or case.ordered()
    batch = jax.tree.map(lambda x: x[images], case.batch)
    slot = order.slot[images] if len(order.slot) > 1 else order.slot
    params = case.generator.unrolled(case.params)[1] if unroll else case.params
    run = sampler(case, order.sizes, order.rooms, unroll, segments)
    return np.asarray(run(params, batch, slot, image_keys(case.images)[images]))


@every_case
def test_tokens_are_finite_and_differ(case):
    tokens = sampled(case)
    assert tokens.shape == case.tokens.shape
    assert np.isfinite(tokens).all()
    assert len(np.unique(tokens)) > 0.98 * tokens.size


@every_case
def test_an_image_does_not_depend_on_its_neighbours(case):
    together = sampled(case)
    np.testing.assert_allclose(sampled(case, images=slice(3, 4)), together[3:4], **CLOSE)


@pytest.mark.parametrize("name", ["mar", "causal_flow", "givt_masked"])
def test_a_sampler_is_one_program_that_never_turns_to_the_host(name):
    """Token loop and the head's inner loop together: compiled once, fed once, read once."""
    case, order = CASES[name], CASES[name].ordered()
    run = sampler(case, order.sizes, order.rooms, False, 1)
    arguments = jax.device_put((case.params, case.batch, order.slot, image_keys(case.images)))
    compiled = []
    with jax.transfer_guard("disallow"):
        for _ in range(2):
            jax.block_until_ready(run(*arguments))
            compiled.append(run._cache_size())
    assert compiled[0] == compiled[1], "the second draw compiled again"
    text = run.lower(*arguments).compile().as_text()
    assert text.count(" while(") >= 2, "a loop over decode steps with a loop over inner steps"
    assert not re.search(r"callback|infeed|outfeed|\b(send|recv)\(", text)


@every_case
def test_layout_and_a_growing_state_draw_the_same(case):
    np.testing.assert_allclose(sampled(case, unroll=True, segments=3), sampled(case), **CLOSE)


@pytest.mark.parametrize(("name", "shape"), [("mar", MeshShape(2, 2, 1)), ("causal_flow", MeshShape(2, 1, 2))])
def test_images_are_the_same_on_four_devices_with_sharded_weights(name, shape):
    case, order = CASES[name], CASES[name].ordered()
    mesh = make_mesh(shape, jax.devices()[:4])
    params = jax.device_put(case.params, shard(case.params, mesh, case.generator.rules, smallest=16))
    batch, keys = jax.device_put((case.batch, image_keys(case.images)), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        got = sampler(case, order.sizes, order.rooms, False, 1)(params, batch, order.slot, keys)
    np.testing.assert_allclose(got, sampled(case), **CLOSE)


def test_tensor_parallelism_divides_networks_and_head():
    case = CASES["mar"]
    mesh = make_mesh(MeshShape(1, 1, 2), jax.devices()[:2])
    params = shard(case.params, mesh, case.generator.rules)
    divided = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, where in jax.tree_util.tree_leaves_with_path(params)
        if not where.is_fully_replicated
    }
    assert {
        f"{net}/blocks/{part}/kernel" for net in ("encoder", "decoder") for part in ("qkv", "out", "fc1", "fc2")
    } | {f"head/net/blocks/{part}/kernel" for part in ("fc1", "fc2")} <= divided


@pytest.mark.parametrize("case", [MASKED["mar"]], ids=["mar"])
def test_a_padded_scan_draws_what_single_steps_draw(case):
    order = case.ordered()
    assert max(order.rooms) > min(order.sizes), "nothing is padded"
    np.testing.assert_allclose(sampled(case, order), sampled(case, order.replace(rooms=())), **CLOSE)


@every_masked
def test_every_order_and_number_of_steps_gives_what_a_recomputation_gives(case):
    """Tokens of every step are drawn again from the known ones, without loop, state or padding."""
    for steps in (5, SPEC.n):
        order = case.ordered(steps=steps)
        tokens = to_ranks(sampled(case, order), order)
        call = functools.partial(case.generator.apply, {"params": case.params})
        drop = jnp.zeros(case.images, bool)
        cond = paired(*(call(case.batch, drop ^ without, method="condition") for without in (False, True)))

        @jax.jit
        def redraw(tokens, first, i, cond=cond, call=call, order=order, steps=steps):
            h = call(tokens, first, cond, order, method="hidden")
            ranks = jnp.arange(SPEC.n)
            keys = jax.vmap(lambda key: jax.vmap(functools.partial(jax.random.fold_in, key))(ranks))(
                image_keys(len(tokens))
            )
            return call(h, keys, i, steps, method=lambda self, h, keys, i, n: self.head.sample(h, keys, knobs(n), i))

        first = 0
        for i, size in enumerate(order.sizes):
            hidden_ones = jnp.arange(SPEC.n)[None, :, None] >= first
            again = redraw(jnp.where(hidden_ones, 1e3, tokens), jnp.int32(first), i)  # what is unknown is not read
            np.testing.assert_allclose(again[:, first : first + size], tokens[:, first : first + size], **CLOSE)
            first += size


@pytest.mark.parametrize("case", [MASKED["mar"]], ids=["mar"])
def test_hidden_rows_do_not_depend_on_the_order_of_known_tokens(case):
    order, known = case.ordered(), 7
    tokens = to_ranks(case.tokens, order)
    call = functools.partial(case.generator.apply, {"params": case.params})
    cond = call(case.batch, jnp.zeros(case.images, bool), method="condition")
    mixed = np.arange(SPEC.n)
    mixed[:known] = np.random.default_rng(0).permutation(known)
    other = order.replace(slot=jnp.asarray(order.slot)[:, mixed])
    hidden = jax.jit(lambda tokens, order: call(tokens, jnp.int32(known), cond, order, method="hidden"))
    a, b = hidden(tokens, order), hidden(tokens[:, mixed], other)
    np.testing.assert_allclose(a[:, mixed], b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        jax.jit(lambda tokens: call(tokens, jnp.int32(known), cond, order, method="hidden"))(tokens[:, :known]),
        a,
        rtol=1e-4,
        atol=1e-5,
    )  # room for unknown tokens changes nothing
    moved = hidden(tokens.at[:, known - 1].add(1.0), order)
    assert (np.abs(moved - a).max((1, 2)) > 1e-4).all(), "known tokens must be seen"


@pytest.mark.parametrize("name", ["causal_flow", "givt"])
def test_cached_sampling_equals_a_redraw_from_the_teacher_forced_pass(name):
    case = CASES[name]
    tokens, order, n = sampled(case), case.ordered(), SPEC.n
    keys = jax.vmap(lambda key: jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(n)))(
        image_keys(case.images)
    )

    def redraw(self):
        drop = jnp.zeros(case.images, bool)
        cond = paired(self.condition(case.batch, drop), self.condition(case.batch, ~drop))
        h = self.hidden(widen(jnp.asarray(tokens), 2), cond, order)
        each = [self.head.sample(h[:, i : i + 1], keys[:, i : i + 1], knobs(n), i) for i in range(n)]
        return jnp.concatenate(each, axis=1)

    got = jax.jit(lambda params: case.generator.apply({"params": params}, method=redraw))(case.params)
    np.testing.assert_allclose(got, tokens, **CLOSE)


@every_case
def test_loss_falls_and_every_parameter_moves(case):
    generator, tx = case.generator, optax.adam(1e-2)
    drop = jnp.array([False, True] * (case.images // 2))

    @jax.jit
    def update(params, opt, key):
        def loss_fn(params):
            loss, weight, _ = generator.apply(
                {"params": params}, case.tokens, case.batch, case.ordered(), drop=drop, key=key, method="loss"
            )
            return (loss * weight).sum() / weight.sum()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, loss

    first = params = initial_params(generator)
    opt, losses = jax.jit(tx.init)(params), []
    for step in range(60):
        params, opt, loss = update(params, opt, jax.random.key(step))
        losses.append(float(loss))
        if step == 4:
            still = never_moved(first, params)
            assert all("uncond" in name for name in still), f"never moved: {still}"
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:3])


@pytest.mark.parametrize(("n", "steps"), [(256, 64), (256, 256), (16, 5), (12, 1), (7, 7)])
def test_cosine_sizes_cover_all_ranks_and_no_step_is_empty(n, steps):
    sizes = cosine_sizes(n, steps)
    assert (len(sizes), sum(sizes)) == (steps, n)
    assert min(sizes) >= 1
    room = rooms(sizes, 4)
    assert all(big >= small for big, small in zip(room, sizes))
    assert len([i for i in range(1, steps) if room[i] != room[i - 1]]) < 4
    assert sum(rooms(sizes, steps)) == n


def test_cosine_sizes_by_hand():
    assert cosine_sizes(16, 4) == (2, 3, 5, 6)  # of 16 cos(pi/8 i) stay 14, 11, 6
    assert rooms((2, 3, 5, 6), 2) == (3, 3, 6, 6)
    with pytest.raises(ValueError, match=r"order\.steps is 17; it must be 1 to 16"):
        cosine_sizes(16, 17)


def test_tokens_that_a_maskgit_keeps_stay_and_each_step_keeps_as_many_as_the_order_says():
    case, order = CASES["givt_masked"], CASES["givt_masked"].ordered()
    call, keys = functools.partial(case.generator.apply, {"params": case.params}), image_keys(case.images)
    setting = Task(case.generator, case.params, case.batch, order, knobs(len(order.sizes)), keys, True).setting()

    @jax.jit
    def step(state, i, first):
        now = Step(i, first, jax.vmap(lambda key: jax.random.fold_in(key, first)[None])(keys))
        return call(state, now, setting, method="step")

    state, first, places = call(setting, case.images, method="begin"), 0, []
    for i, size in enumerate(order.sizes):
        before = state
        state = step(state, jnp.int32(i), jnp.int32(first))
        first += size
        assert (state.known.sum(1) == first).all()
        assert (state.known | ~before.known).all()
        np.testing.assert_array_equal(state.tokens[before.known], before.tokens[before.known])
        places.append(np.asarray(state.known & ~before.known))
    assert len(np.unique(np.stack(places[0]), axis=0)) > 1, "every image chooses its own slots"
    np.testing.assert_allclose(state.tokens, sampled(case), **CLOSE)


def test_a_maskgit_does_not_see_hidden_tokens_and_begins_with_those_known_beforehand():
    case = CASES["givt_masked"]
    call = functools.partial(case.generator.apply, {"params": case.params})
    known = np.zeros(SPEC.n, bool)
    known[[1, 4, 5, 10]] = True
    cond = call(case.batch, jnp.zeros(case.images, bool), method="condition")
    hidden = jnp.broadcast_to(~known, case.tokens.shape[:2])
    look = jax.jit(lambda tokens: call(tokens, hidden, cond, method="hidden"))
    other = jnp.where(hidden[..., None], 1e3, case.tokens)
    np.testing.assert_array_equal(look(other), look(case.tokens))
    order = known_first(case.order, SPEC, known, image_keys(case.images))
    source = Source(jnp.asarray(case.tokens), jnp.broadcast_to(known, hidden.shape), int(known.sum()))
    run = jax.jit(
        lambda keys: Sequential()(
            Task(case.generator, case.params, case.batch, order, knobs(len(order.sizes)), keys, True, source=source)
        )[0]
    )
    got = run(image_keys(case.images))
    np.testing.assert_array_equal(got[:, known], case.tokens[:, known])
    assert np.isfinite(got).all()
    assert (np.abs(got[:, ~known] - case.tokens[:, ~known]) > 1e-3).any(-1).all()
