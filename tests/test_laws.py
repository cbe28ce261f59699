"""What holds for every method (DESIGN, section 9)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, DRAWN
from trees import initial_params, never_moved

from ar_jax.decode.edit import Source
from ar_jax.decode.guidance import Interval
from ar_jax.decode.jacobi import Jacobi
from ar_jax.decode.logits import Filter
from ar_jax.decode.sampling import Sampling
from ar_jax.decode.sequential import Sequential, Task
from ar_jax.decode.temperature import Constant
from ar_jax.generators.base import Knobs
from ar_jax.machine.sharding import MeshShape, batch_sharding, make_mesh, shard
from ar_jax.nets.conditioning import paired, widen
from ar_jax.orders import to_ranks
from ar_jax.train.optim import Optim, decayed, make_optimiser

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_drawn = pytest.mark.parametrize("case", DRAWN.values(), ids=DRAWN.keys())
GUIDANCE, TEMPERATURE, FILTER = 1.7, 0.9, Filter(top_k=9, top_p=0.95)


def knobs(steps):
    return Knobs(jnp.full(steps, GUIDANCE), jnp.full(steps, TEMPERATURE), FILTER)


def image_keys(count):
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(6)))(jnp.arange(count))


@functools.cache
def sampler(case, unroll=True, segments=1):
    generator = case.generator.unrolled(case.params)[0] if unroll else case.generator

    @jax.jit
    def run(params, batch, slot, keys):
        order = case.order(generator.spec, None, case.images).replace(slot=slot)
        task = Task(generator, params, batch, order, knobs(len(order.sizes)), keys, True, case.tokenizer)
        return Sequential(segments)(task)[0]

    return run


def sampled(case, images=slice(None), unroll=True, segments=1):
    batch = jax.tree.map(lambda x: x[images], case.batch)
    slot = case.order(case.generator.spec, None, case.images).slot
    slot = slot[images] if len(slot) > 1 else slot
    params = case.generator.unrolled(case.params)[1] if unroll else case.params
    return np.asarray(sampler(case, unroll, segments)(params, batch, slot, image_keys(case.images)[images]))


@functools.cache
def forced(case, guided):
    order = case.order(case.generator.spec, None, case.images)

    @jax.jit
    def run(params, tokens):
        def run(self):
            cond = self.condition(case.batch, jnp.zeros(case.images, bool))
            if guided:
                cond = paired(cond, self.condition(case.batch, jnp.ones(case.images, bool)))
            ranked, ways = to_ranks(tokens, order), 2 if guided else 1
            ordered = order.replace(slot=widen(order.slot, ways if len(order.slot) > 1 else 1))
            return self.hidden(widen(ranked, ways), cond, ordered, case.tokenizer)

        return case.generator.apply({"params": params}, method=run)

    return run


def hidden(case, tokens, guided=False):
    """Hidden rows of a teacher-forced pass over tokens in slot order."""
    return forced(case, guided)(case.params, tokens)


def legal_codes(spec, tokens):
    """Which codes may stand in every slot after those before it, [b n v]; all where there is no grammar."""
    if spec.grammar is None:
        return True
    state, legal = jnp.zeros(len(tokens), jnp.int32), []
    for i in range(spec.n):
        legal.append(spec.grammar.legal(state, spec.n - i))
        state = spec.grammar.follow(state, tokens[:, i, 0])
    return jnp.stack(legal, axis=1)


@every_case
def test_rows_do_not_see_their_own_or_later_tokens(case):
    order = case.order(case.generator.spec, None, case.images)
    middle = (len(order.sizes) - 1) // 2
    rank, size = sum(order.sizes[:middle]), order.sizes[middle]
    later = np.zeros((case.images, case.generator.spec.n, 1), bool)
    np.put_along_axis(later, np.broadcast_to(order.slot, later.shape[:2])[:, rank:, None], True, axis=1)
    changed = np.where(later, (case.tokens + 1) % case.generator.spec.codes[0], case.tokens)
    a, b = hidden(case, case.tokens), hidden(case, changed)
    np.testing.assert_array_equal(a[:, : rank + size], b[:, : rank + size])
    assert (np.abs(a - b)[:, rank + size :].max(axis=(1, 2)) > 1e-4).all(), "later rows must see the change"


@every_case
def test_cached_sampling_equals_a_redraw_from_the_teacher_forced_pass(case):
    tokens = sampled(case)
    order, n = case.order(case.generator.spec, None, case.images), case.generator.spec.n
    keys = jax.vmap(lambda key: jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(n)))(
        image_keys(case.images)
    )
    h, legal = hidden(case, tokens, guided=True), legal_codes(case.generator.spec, tokens)
    legally = knobs(n).replace(filter=lambda logits: FILTER(jnp.where(legal, logits, -jnp.inf)))
    draw = jax.jit(lambda params, h: case.generator.apply(
        {"params": params}, method=lambda self: self.head.sample(h, keys, legally, 0)
    ))  # fmt: skip
    redraw = draw(case.params, h)
    np.testing.assert_array_equal(redraw, to_ranks(tokens, order))
    assert len(np.unique(tokens.reshape(-1, tokens.shape[-1]), axis=0)) > 3, "a constant would pass too"


@every_drawn
def test_stacked_layers_and_a_growing_cache_draw_the_same(case):
    np.testing.assert_array_equal(sampled(case), sampled(case, unroll=False, segments=3))


@every_drawn
def test_an_image_does_not_depend_on_its_neighbours(case):
    together = sampled(case)
    for i in (0, case.images - 1):
        np.testing.assert_array_equal(sampled(case, slice(i, i + 1)), together[i : i + 1])


FSDP, TP = MeshShape(2, 2, 1), MeshShape(2, 1, 2)


@pytest.mark.parametrize(  # fsdp has no rules of a network, so one of each kind will do
    ("name", "shape"), [*((name, TP) for name in DRAWN), ("llamagen_caption", FSDP), ("var", FSDP), ("hmar", FSDP)]
)
def test_images_are_the_same_on_four_devices_with_sharded_weights(name, shape):
    case = DRAWN[name]
    mesh = make_mesh(shape, jax.devices()[:4])
    generator, params = case.generator.unrolled(case.params)
    params = jax.device_put(params, shard(params, mesh, generator.rules, smallest=16))
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(params))
    batch, keys = jax.device_put((case.batch, image_keys(case.images)), batch_sharding(mesh))
    slot = case.order(case.generator.spec, None, case.images).slot
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(sampler(case)(params, batch, slot, keys), sampled(case))


@every_drawn
def test_loss_falls_and_every_parameter_moves(case):
    generator, order = case.generator, case.order(case.generator.spec, None, case.images)
    tx = make_optimiser(Optim(lr=1e-2, weight_decay=0.0), 100, {"model": decayed(generator.init_params)})
    drop = jnp.array([False, True] * (case.images // 2))

    def loss_fn(params):
        loss, weight, _ = generator.apply(
            {"params": params["model"]}, case.tokens, case.batch, order, drop=drop, tokenizer=case.tokenizer,
            method="loss",
        )  # fmt: skip
        return (loss * weight).sum() / weight.sum()

    @jax.jit
    def update(params, opt):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, loss

    first = params = {"model": initial_params(generator)}
    opt, losses = jax.jit(tx.init)(params), []
    for step in range(30):
        params, opt, loss = update(params, opt)
        losses.append(float(loss))
        if step == 2:
            still = never_moved(first, params)
            assert all("uncond" in name for name in still), f"never moved: {still}"
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", ["llamagen_caption", "causal_order_per_image"])
def test_jacobi_draws_the_tokens_of_one_after_the_other_in_fewer_calls(name):
    """With guidance that changes from step to step, a temperature and filters; windows of several sizes."""
    case = CASES[name]
    generator, params = case.generator.unrolled(case.params)
    order, keys = case.order(generator.spec, None, case.images), image_keys(case.images)
    sampling = Sampling(Interval(GUIDANCE, last=4), Constant(TEMPERATURE), FILTER)

    def drawn(decoder, source=None):
        value = dataclasses.replace(sampling, decoder=decoder)
        return jax.jit(lambda params: value.tokens(generator, params, case.batch, order, keys=keys, source=source))(params)

    want, plain = drawn(Sequential())
    known = np.zeros((case.images, order.n), bool)
    known[:, [2, 3, 7]] = True
    source = Source(jnp.asarray(case.tokens), jnp.asarray(known))
    for decoder in (Jacobi(5), Jacobi(64)):
        tokens, account = drawn(decoder)
        np.testing.assert_array_equal(tokens, want)
        calls, accepted = np.asarray(account.calls["generator"]), np.asarray(account.accepted)
        assert (calls < plain.calls["generator"]).all()
        np.testing.assert_array_equal(accepted.sum(1), order.n)
        np.testing.assert_array_equal((accepted > 0).sum(1), calls)
    np.testing.assert_array_equal(drawn(Jacobi(5), source)[0], drawn(Sequential(), source)[0])
