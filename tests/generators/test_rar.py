"""RAR: what holds beside the laws (cases.py)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, INFO, SPEC

from ar_jax.convert.sources import param_shapes
from ar_jax.decode.jacobi import Jacobi
from ar_jax.decode.sampling import Sampling
from ar_jax.generators.rar import Aimed, Annealed, Placed, PowerCosine, StartLabel
from ar_jax.orders import raster

CASE = CASES["rar"]


def keys(count):
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(0)))(jnp.arange(count))


@functools.cache
def slots(train_step, count=400):
    return np.asarray(Annealed(10, 20)(SPEC, keys(count), count, train_step).slot)


def in_raster_order(slot):
    return (slot == np.arange(SPEC.n)).all(1)


def test_orders_are_random_at_first_and_raster_order_in_the_end():
    for step in (0, 10, 14, 20, 99):
        np.testing.assert_array_equal(np.sort(slots(step)), np.tile(np.arange(SPEC.n), (400, 1)))
    assert not in_raster_order(slots(10)).any()
    assert len({tuple(slot) for slot in slots(0)}) == 400
    # every slot comes first equally often, within four standard deviations
    first = np.bincount(slots(0)[:, 0], minlength=SPEC.n)
    assert (np.abs(first - 400 / SPEC.n) < 4 * (400 / SPEC.n) ** 0.5).all()
    assert abs(in_raster_order(slots(14)).mean() - 0.4) < 4 * (0.4 * 0.6 / 400) ** 0.5
    assert in_raster_order(slots(20)).all()
    assert in_raster_order(slots(99)).all()


def test_an_order_depends_on_its_image_only_and_later_ones_are_the_same_or_raster():
    np.testing.assert_array_equal(slots(10, 7), slots(10)[:7])
    still = ~in_raster_order(slots(14))
    np.testing.assert_array_equal(slots(14)[still], slots(0)[still])
    assert Annealed(10, 20)(SPEC, keys(3), 3, 0).sizes == (1,) * SPEC.n


def test_guidance_rises_on_a_cosine_of_a_power_of_the_progress():
    order = raster(SPEC)
    gone = np.arange(12) / 12
    np.testing.assert_allclose(PowerCosine(5.0, 2.0)(order, SPEC), 1 + 4 * np.sin(np.pi / 2 * gone**2) ** 2, rtol=1e-6)
    np.testing.assert_array_equal(PowerCosine(5.0, 0.0)(order, SPEC), np.full(12, 5, np.float32))
    np.testing.assert_array_equal(PowerCosine()(order, SPEC), np.ones(12, np.float32))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Annealed(5, 5), r"order\.start is 5 and order\.end 5; needed is 0 <= start < end"),
        (lambda: PowerCosine(np.inf), r"guidance\.weight is inf"),
        (lambda: PowerCosine(2.0, -1.0), r"guidance\.power is -1\.0; it must be a finite number of 0 or more"),
        (lambda: shapes(inputs=Aimed(rows=11)), r"inputs\.rows is 11, but the tokenizer has 12 slots"),
        (lambda: shapes(backbone=Placed(1, 16, 2, rows=12)), r"backbone\.rows is 12, but the sequence has 13"),
        (lambda: shapes(backbone=Placed(1, 16, 3)), r"Placed: width / heads is 16 / 3; it must be a whole number"),
        (lambda: shapes(conditioning=StartLabel(16, apart=True)), r"conditioning\.apart is True"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def shapes(**parts):
    generator = CASE.generator.clone(**parts).complete(SPEC, INFO)
    return param_shapes(generator)


def test_rows_of_the_released_tables_are_added_or_left_out():
    released = shapes(inputs=Aimed(rows=20), backbone=Placed(1, 16, 2, rows=30))
    assert [released["inputs"][name].shape[0] for name in ("embedding", "position", "aim")] == [12, 20, 22]
    assert released["conditioning"]["embedding"].shape == (5, 16)
    assert released["backbone"]["place"].shape == (30, 16)
    own = shapes()
    assert [own["inputs"][name].shape[0] for name in ("position", "aim")] == [12, 14]
    assert own["backbone"]["place"].shape == (13, 16)


@functools.cache
def forced():
    @jax.jit
    def run(params, slot):
        order = CASE.order(SPEC, None, CASE.images).replace(slot=slot)

        def rows(self):
            cond = self.condition(CASE.batch, jnp.zeros(CASE.images, bool))
            return self.hidden(jnp.asarray(CASE.tokens), cond, order)

        return CASE.generator.apply({"params": params}, method=rows)

    return run


def test_a_row_knows_where_the_token_that_it_predicts_lies_and_nothing_of_later_places():
    slot = CASE.order(SPEC, None, CASE.images).slot
    changed = slot.copy()
    changed[:, [5, 9]] = slot[:, [9, 5]]  # of tokens in rank order, which stay
    a, b = forced()(CASE.params, slot), forced()(CASE.params, changed)
    np.testing.assert_array_equal(a[:, :5], b[:, :5])
    assert (np.abs(a - b)[:, 5].max(-1) > 1e-4).all(), "its aim"


def test_every_place_of_the_sequence_is_modulated_by_its_own_vector():
    slot, params = CASE.order(SPEC, None, CASE.images).slot, CASE.params
    place = jnp.asarray(params["backbone"]["place"]).at[7].add(1.0)  # start, condition, then token 5
    a, b = forced()(params, slot), forced()(params | {"backbone": params["backbone"] | {"place": place}}, slot)
    np.testing.assert_array_equal(a[:, :6], b[:, :6])
    assert (np.abs(a - b)[:, 6].max(-1) > 1e-4).all()


def test_windows_of_jacobi_find_the_places_of_their_rows():
    generator, params = CASE.generator.unrolled(CASE.params)
    order, own = CASE.order(SPEC, None, CASE.images), Sampling(PowerCosine(3.0, 1.5))

    def drawn(sampling):
        return jax.jit(lambda params: sampling.tokens(generator, params, CASE.batch, order, keys=keys(CASE.images)))(
            params
        )

    want, _ = drawn(own)
    tokens, account = drawn(dataclasses.replace(own, decoder=Jacobi(5)))
    np.testing.assert_array_equal(tokens, want)
    assert (np.asarray(account.calls["generator"]) < SPEC.n).all()
