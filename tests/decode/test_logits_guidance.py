import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.decode import logits
from ar_jax.decode.guidance import Interval, Linear, Ramp
from ar_jax.decode.logits import Filter, top_k, top_p
from ar_jax.decode.temperature import Constant
from ar_jax.heads.categorical import draw
from ar_jax.nets.conditioning import Cond, fold, paired, widen
from ar_jax.orders import Order

NONE = -np.inf


def rows(*shape, seed=0):
    return np.random.default_rng(seed).normal(0, 2, shape).astype(np.float32)


def test_top_k_keeps_the_k_largest():
    np.testing.assert_array_equal(
        top_k(np.float32([[1, 4, -2, 3], [-1, -4, -3, -2]]), 2), [[NONE, 4, NONE, 3], [-1, NONE, NONE, -2]]
    )


def test_top_k_keeps_all_that_tie_with_the_last_one():
    np.testing.assert_array_equal(top_k(np.float32([2, 1, 2, 2, 0]), 2), [2, NONE, 2, 2, NONE])
    kept = jax.jit(lambda x: top_k(x, 2))(np.float32([0.0, -0.0, -1, 5]))
    np.testing.assert_array_equal(kept, [0, 0, NONE, 5])


@pytest.mark.parametrize("k", [0, 50, 51])
def test_top_k_of_zero_or_of_all_changes_nothing(k):
    logits = rows(3, 50)
    np.testing.assert_array_equal(top_k(logits, k), logits)


@pytest.mark.parametrize("k", [1, 7, 49])
def test_top_k_agrees_with_a_sort(k):
    logits = rows(2, 5, 50)
    least = np.sort(logits, axis=-1)[..., -k, None]
    np.testing.assert_array_equal(top_k(logits, k), np.where(logits < least, NONE, logits))


def nucleus(logits, p):
    """Goes down the entries and stops once the probability of those kept exceeds p."""
    weight = np.exp(logits.astype(np.float64) - logits.max())
    out, mass = np.full_like(logits, NONE), 0.0
    for i in np.argsort(-logits, kind="stable"):
        out[i] = logits[i]
        mass += weight[i] / weight.sum()
        if mass > p:
            break
    return out


@pytest.mark.parametrize("p", [0.05, 0.3, 0.77, 0.95, 0.999])
def test_top_p_agrees_with_a_plain_loop(p):
    logits = rows(40, 60)
    expected = np.stack([nucleus(row, p) for row in logits])
    np.testing.assert_array_equal(top_p(logits, p), expected)
    assert (expected == NONE).any(), "a filter that keeps all would pass too"


def test_top_p_always_keeps_the_most_likely():
    kept = np.isfinite(top_p(rows(30, 20), 1e-6))
    np.testing.assert_array_equal(kept.sum(-1), np.ones(30))
    np.testing.assert_array_equal(kept.argmax(-1), rows(30, 20).argmax(-1))


def test_top_p_keeps_ties_and_leaves_removed_entries_out():
    np.testing.assert_array_equal(top_p(np.float32([3, 3, NONE, 0]), 0.3), [3, 3, NONE, NONE])


def test_filters_find_the_same_threshold_by_large_digits_without_a_sort_or_a_loop(monkeypatch):
    """As on a GPU, where every bit of a loop would start kernels."""
    x = np.concatenate([rows(6, 80), np.round(rows(2, 80)), np.float32([[0.0, -0.0, NONE, 7] * 20])])

    def filtered(device, function):
        monkeypatch.setattr(logits, "platform", lambda: device)
        compiled = jax.jit(lambda x: function(x)).lower(x).compile()
        return np.asarray(compiled(x)), compiled.as_text()

    for function in (lambda x: top_k(x, 9), lambda x: top_p(x, 0.7)):
        (want, _), (got, text) = filtered("cpu", function), filtered("gpu", function)
        np.testing.assert_array_equal(got, want)
        assert " while(" not in text
        assert " sort(" not in text
        assert text.count(" reduce(") <= 2 + 2 * 8, "a pass for every digit, and the sum of its results"


def test_top_p_of_one_changes_nothing():
    np.testing.assert_array_equal(top_p(rows(3, 9), 1.0), rows(3, 9))


def test_a_filter_takes_top_p_of_what_top_k_left():
    logits = np.log(np.float32([[0.4, 0.3, 0.2, 0.1]]))
    # of 0.4 and 0.3 alone, the first has 57%; of all four it has 40%
    np.testing.assert_array_equal(np.isfinite(Filter(top_k=2, top_p=0.5)(logits)), [[True, False, False, False]])
    np.testing.assert_array_equal(np.isfinite(Filter(top_p=0.5)(logits)), [[True, True, False, False]])
    np.testing.assert_array_equal(Filter()(logits), logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": -1}, "top_k must be 0 .off. or positive, got -1"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must lie in \(0, 1\], got 1.5"),
        ({"top_p": float("nan")}, "top_p must lie in"),
    ],
)
def test_a_filter_refuses_settings_outside_their_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Filter(**settings)


drawn_from = jax.jit(draw)


def keys(images, tokens, seed=0):
    return jax.random.split(jax.random.key(seed), (images, tokens))


def test_temperature_zero_draws_the_largest():
    logits = rows(4, 3, 17)
    np.testing.assert_array_equal(drawn_from(logits, keys(4, 3), jnp.zeros(())), logits.argmax(-1))


def test_draws_occur_as_often_as_their_softmax_says():
    logits, count = np.float32([1.0, 0.0, -np.inf, 2.0, -1.0, 0.5]), 20000
    drawn = drawn_from(np.tile(logits, (count, 1, 1)), keys(count, 1), jnp.ones(()))
    p = np.exp(logits) / np.exp(logits).sum()
    seen = np.bincount(np.asarray(drawn)[:, 0], minlength=6) / count
    assert (np.abs(seen - p) <= 4.5 * np.sqrt(p * (1 - p) / count)).all(), (seen, p)
    assert seen[2] == 0


def test_a_draw_depends_on_its_own_key_only():
    logits = rows(6, 2, 17)
    together = drawn_from(logits, keys(6, 2), jnp.ones(()))
    np.testing.assert_array_equal(drawn_from(logits[3:4], keys(6, 2)[3:4], jnp.ones(())), together[3:4])
    assert (np.asarray(together) != np.asarray(drawn_from(logits, keys(6, 2, seed=1), jnp.ones(())))).any()


def test_paired_puts_each_condition_before_its_unconditional_row():
    cond = Cond(np.arange(4.0).reshape(2, 1, 2), np.array([[True], [False]]))
    uncond = Cond(np.arange(4.0).reshape(2, 1, 2) + 10, np.array([[False], [True]]))
    both = paired(cond, uncond)
    np.testing.assert_array_equal(both.rows[:, 0], [[0, 1], [10, 11], [2, 3], [12, 13]])
    np.testing.assert_array_equal(both.valid[:, 0], [True, False, False, True])


def test_widen_repeats_each_image_for_its_guided_rows():
    np.testing.assert_array_equal(widen(jnp.array([[1, 2], [3, 4]]), 2), [[1, 2], [1, 2], [3, 4], [3, 4]])
    np.testing.assert_array_equal(widen(jnp.array([[1, 2], [3, 4]]), 1), [[1, 2], [3, 4]])


def test_fold_moves_from_the_unconditional_row_through_the_conditional_one():
    guided = np.float32([[[1, 2]], [[0, 4]], [[5, 5]], [[4, 7]]])  # cond0, uncond0, cond1, uncond1
    np.testing.assert_array_equal(fold(guided, 2, 3.0), [[[3, -2]], [[7, 1]]])
    np.testing.assert_array_equal(fold(guided, 2, 0.0), guided[1::2])
    np.testing.assert_array_equal(fold(guided, 1, 3.0), guided)


def test_weight_one_gives_the_conditional_logits_exactly():
    guided = rows(6, 2, 50) * 1e3
    np.testing.assert_array_equal(fold(guided, 2, np.float32(1)), guided[::2])


def weights(rule, sizes):
    return rule(Order(np.arange(sum(sizes), dtype=np.int32)[None], tuple(sizes)), None)


def test_guidance_lasts_from_the_first_token_to_the_last_guided_decode_step():
    np.testing.assert_array_equal(weights(Interval(2.5), [1] * 6), [2.5] * 6)
    np.testing.assert_array_equal(weights(Interval(2.5, 0), [1] * 6), [2.5, 2.5, 1, 1, 1, 1])
    np.testing.assert_array_equal(weights(Interval(2.5, 2), [1] * 6), [2.5, 2.5, 2.5, 2.5, 1, 1])
    np.testing.assert_array_equal(weights(Interval(2.5, 100), [1] * 6), [2.5] * 6)
    assert weights(Interval(2.5), [1] * 6).dtype == np.float32


def test_ramps_by_hand():
    np.testing.assert_allclose(weights(Ramp(2.0), [1, 4, 9]), [1, 2, 3])
    np.testing.assert_allclose(weights(Ramp(2.0, reach=1), [1, 4, 9]), [1, 3, 5])
    np.testing.assert_allclose(weights(Linear(3.0), [2, 3, 5]), [1 + 2 * 2 / 10, 1 + 2 * 5 / 10, 1 + 2 * 9 / 10])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Interval(float("nan")), "guidance.weight is nan; it must be a finite number"),
        (lambda: Ramp(float("inf")), "guidance.weight is inf; it must be a finite number"),
        (lambda: Constant(-1.0), "temperature.value is -1.0; it must be a finite number of 0 or more"),
        (lambda: Constant(float("nan")), "temperature.value is nan; it must be a finite number of 0 or more"),
    ],
)
def test_numbers_outside_their_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
