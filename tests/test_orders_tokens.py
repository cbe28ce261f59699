import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SPEC, backwards, shuffled

from ar_jax import orders
from ar_jax.orders import Order, raster, scan_steps, to_ranks, to_slots
from ar_jax.tokens import TokenSpec, grid


@pytest.mark.parametrize("order_fn", [raster, backwards, shuffled])
def test_every_image_of_an_order_visits_each_slot_once(order_fn):
    order = order_fn(SPEC, jax.random.split(jax.random.key(0), 3), 3, 0)
    assert order.slot.dtype == np.int32
    assert order.slot.shape[0] in (1, 3)
    np.testing.assert_array_equal(np.sort(order.slot, axis=-1), np.tile(np.arange(SPEC.n), (len(order.slot), 1)))
    assert sum(order.sizes) == SPEC.n


def test_raster_reveals_the_slots_in_reading_order_one_a_step():
    order = raster(TokenSpec(grid(2, 3), codes=(5,)))
    np.testing.assert_array_equal(order.slot, [[0, 1, 2, 3, 4, 5]])
    assert order.sizes == (1, 1, 1, 1, 1, 1)
    np.testing.assert_array_equal(order.step, [0, 1, 2, 3, 4, 5])


def test_step_counts_the_steps_of_uneven_sizes():
    order = Order(np.arange(7)[None], (1, 3, 2, 1))
    np.testing.assert_array_equal(order.step, [0, 1, 1, 1, 2, 2, 3])


def test_to_ranks_takes_the_slots_in_order_and_to_slots_puts_them_back():
    order = Order(np.array([[2, 0, 1], [1, 2, 0]], np.int32), (1, 1, 1))
    tokens = np.array([[[10], [11], [12]], [[20], [21], [22]]], np.int32)
    ranked = to_ranks(tokens, order)
    np.testing.assert_array_equal(ranked[..., 0], [[12, 10, 11], [21, 22, 20]])
    np.testing.assert_array_equal(to_slots(ranked, order), tokens)


@pytest.mark.parametrize("order_fn", [raster, backwards, shuffled])
def test_to_slots_inverts_to_ranks_for_codes_and_for_continuous_tokens(order_fn):
    random = np.random.default_rng(0)
    order = order_fn(SPEC, None, 3, 0)
    codes = random.integers(11, size=(3, SPEC.n, 2)).astype(np.int32)
    latents = random.normal(size=(3, SPEC.n, 4)).astype(np.float32)
    for tokens in (codes, latents):
        np.testing.assert_array_equal(to_slots(to_ranks(tokens, order), order), tokens)
        np.testing.assert_array_equal(to_ranks(to_slots(tokens, order), order), tokens)


SIZES = (1, 2, 2, 2, 3, 1, 1, 4, 4, 1)


def visit(state, step, first, size):
    """Notes where each rank was revealed, and a sum in which the order of the steps matters."""
    ranks = first + jnp.arange(size)
    seen = state["seen"].at[ranks].add(1)
    where = state["where"].at[ranks].set(step)
    return {"seen": seen, "where": where, "mix": (3 * state["mix"] + 7 * step + first + size) % 65521}


@pytest.mark.parametrize("jit", [False, True])
def test_scan_steps_equals_a_plain_loop_over_mixed_sizes(jit):
    start = {"seen": jnp.zeros(sum(SIZES), int), "where": jnp.full(sum(SIZES), -1), "mix": jnp.int32(1)}
    run = lambda state: scan_steps(SIZES, visit, state)  # noqa: E731
    state = (jax.jit(run) if jit else run)(start)

    mix, where, first = 1, [], 0
    for step, size in enumerate(SIZES):
        mix = (3 * mix + 7 * step + first + size) % 65521
        where += [step] * size
        first += size
    assert int(state["mix"]) == mix
    np.testing.assert_array_equal(state["where"], where)
    np.testing.assert_array_equal(state["seen"], np.ones(sum(SIZES)))


def test_scan_steps_traces_a_run_of_equal_sizes_once():
    traced = []

    def fn(state, step, first, size):
        traced.append(size)
        return state + first

    assert int(scan_steps((1, 1, 1, 1, 2, 2, 1), fn, jnp.int32(0))) == 0 + 1 + 2 + 3 + 4 + 6 + 8
    assert traced == [1, 2, 1]


def test_a_gpu_calculates_first_ranks_of_equal_steps(monkeypatch):
    """A GPU starts a copy for every look-up, and its loop is then none that it could run by itself."""
    monkeypatch.setattr(orders, "platform", lambda: "gpu")
    run = lambda sizes: jax.jit(lambda x: scan_steps(sizes, lambda x, i, first, size: 3 * x + first + i, x))  # noqa: E731
    looked_up = ["dynamic_slice" in run(sizes).lower(jnp.int32(0)).as_text() for sizes in ((3,) * 8, (3, 4) * 4)]
    assert looked_up == [False, False], "unequal steps are not in a loop"
    rooms = jax.jit(lambda x: scan_steps((3, 4) * 4, lambda x, i, first, size: 3 * x + first + i, x, rooms=(4,) * 8))
    x = 0
    for i, first in enumerate((0, 3, 7, 10, 14, 17, 21, 24)):
        x = 3 * x + first + i
    assert int(rooms(jnp.int32(0))) == x


def test_grid_lists_level_row_and_column_in_reading_order():
    assert grid(2, 3).dtype == np.int32
    np.testing.assert_array_equal(grid(2, 3), [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]])
    np.testing.assert_array_equal(grid(1, 2, level=4), [[4, 0, 0], [4, 0, 1]])
    assert TokenSpec(grid(2, 3), codes=(5,)).n == 6
