"""Discrete diffusion: its processes against counting on four codes, the plan of its steps, what training remembers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import GeneratorStage
from ar_jax.data import Info
from ar_jax.generators.code_diffusion import CodeDiffusion, importance, remembered
from ar_jax.generators.corruption import Hide, MaskAndReplace, Uniform, one_hot, spread
from ar_jax.generators.masked_diffusion import FirstHitting, hitting_chances, hitting_times, onward, picked
from ar_jax.nets.code_transformer import CodeTransformer
from ar_jax.nets.code_unet import CodeUNet
from ar_jax.nets.conditioning import Classes, Features, Nothing
from ar_jax.tokens import TokenSpec, grid, pyramid
from ar_jax.train.recipes import generator_recipe

CODES = 4
PROCESSES = {
    "replace": MaskAndReplace(5, (0.9, 0.2), (0.05, 0.6)),
    "hide": Hide(5, "cos"),
    "uniform": Uniform(5),
}  # fmt: skip
SPEC, INFO = TokenSpec(grid(2, 3), codes=(CODES,)), Info(classes=3)
SMALL = CodeDiffusion(CodeTransformer(1, 8, 2), Classes(), PROCESSES["replace"], weigh_times=True)
every = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


def matrix(process, late, early=-1):
    """Probabilities [from to] of states between two times, by spreading each code; a hidden token stays so."""
    states = process.states(CODES)
    found = spread(one_hot(jnp.arange(CODES)[None], states), process.rates(CODES, late, early), process.hides)[0]
    return np.concatenate([np.exp(np.asarray(found, np.float64)), np.eye(states)[CODES:]])


@every
def test_rows_sum_to_one_and_steps_multiply_to_what_all_of_them_do(process):
    whole = np.eye(process.states(CODES))
    for t in range(process.times):
        step = matrix(process, t, t - 1)
        np.testing.assert_allclose(step.sum(1), 1, atol=1e-6)
        whole = whole @ step
        np.testing.assert_allclose(matrix(process, t), whole, atol=1e-6)
    np.testing.assert_allclose(matrix(process, 1) @ matrix(process, 4, 1), whole, atol=1e-6)


@every
@pytest.mark.parametrize("jump", [(3, 2), (4, 1), (2, -1)])
def test_posteriors_are_those_of_bayes_rule(process, jump):
    late, early = jump
    clean = np.array([0.5, 0.3, 0.15, 0.05])
    before, between, whole = (matrix(process, *t) for t in ((early,), (late, early), (late,)))
    states = process.states(CODES)
    log_p = np.log(np.append(clean, 1e-30)[:states])[None, None].astype(np.float32)
    for noisy in range(states):
        if isinstance(process, Hide) and noisy < CODES:
            want = np.eye(states)[noisy]
        elif isinstance(process, Uniform):  # one token whose code is not known, not a mixture over the clean ones
            want = (np.append(clean, [])[:CODES] @ before) * between[:, noisy]
        else:
            want = sum(p * before[x] * between[:, noisy] / whole[x, noisy] for x, p in enumerate(clean))
        found = process.posterior(
            jnp.asarray(log_p), jnp.full((1, 1), noisy), process.jump(CODES, late, early).take(())
        )
        np.testing.assert_allclose(np.exp(found)[0, 0], want / want.sum(), atol=2e-6)


def test_steps_that_skip_times_end_with_the_same_distribution():
    process, clean = PROCESSES["hide"], np.array([0.5, 0.3, 0.15, 0.05])
    for steps in (1, 2, 5):
        plan = CodeDiffusion(CodeTransformer(1, 8, 2), Nothing(8), process).complete(SPEC, Info()).plan(steps)
        p = np.eye(CODES + 1)[-1]
        for late, early in zip(plan.late, plan.early):
            log_p = jnp.log(jnp.append(clean, 1e-30))[None, None]
            back = [
                process.posterior(log_p, jnp.full((1, 1), x), process.jump(CODES, late, early).take(()))
                for x in range(CODES + 1)
            ]
            p = p @ np.exp(np.concatenate(back)[:, 0])
        np.testing.assert_allclose(p, np.append(clean, 0), atol=1e-5)


def test_plans_by_hand():
    generator = CodeDiffusion(CodeTransformer(1, 8, 2), Nothing(8), MaskAndReplace(10)).complete(SPEC, Info())
    time, late, early, _ = generator.plan(3)
    assert [list(x) for x in (time, late, early)] == [[9, 6, 2], [9, 6, 2], [6, 2, -1]]
    assert list(generator.clone(stride="published").plan(3).late) == [7, 3, 0]
    time, _, early, reveal = generator.clone(reveal="purity").plan(4)
    assert [list(x) for x in (time, early, reveal)] == [[9, 6, 3, 0], [-1] * 4, [2, 2, 2, 0]]
    with pytest.raises(ValueError, match=r"order\.steps is 11, but the process has 10 times; give as many, or fewer"):
        generator.plan(11)


def test_as_many_codes_become_known_as_are_asked_for_the_surest_rather():
    generator = SMALL.clone(reveal="purity", sharpen=1.0).complete(SPEC, INFO).bind({})
    found = jax.nn.log_softmax(jnp.zeros((1, 6, 5)).at[0, 3, 2].set(9.0).at[0, 1, 0].set(9.0))
    noisy, still = jnp.array([[4, 0, 4, 4, 4, 4]]), jnp.zeros((1, 6))
    drawn = generator.revealed(found, noisy, jnp.zeros((1, 6, 5)), still, 1)
    np.testing.assert_array_equal(drawn, [[4, 0, 4, 2, 4, 4]])
    assert (generator.revealed(found, noisy, jnp.zeros((1, 6, 5)), still, 9) < CODES).all()


def test_times_are_drawn_alike_until_all_are_known_and_then_by_their_parts():
    memory = {"squares": jnp.array([9.0, 4.0, 1.0]), "seen": jnp.array([11.0, 12.0, 10.0])}
    np.testing.assert_allclose(importance(memory), 1 / 3)
    memory = remembered(memory, jnp.array([2, 1, 2]), jnp.array([5.0, 3.0, 1.0]))
    np.testing.assert_allclose(memory["squares"], [9, 0.9 * 4 + 0.1 * 9, 1], rtol=1e-6)
    np.testing.assert_array_equal(memory["seen"], [11, 13, 12])
    root = np.sqrt([4.5, 4.5, 1]) + 1e-4
    np.testing.assert_allclose(importance(memory), root / root.sum(), rtol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_remembers_the_times(accumulate):
    stage = GeneratorStage(module=SMALL, batch=4)
    stage = dataclasses.replace(stage, optim=dataclasses.replace(stage.optim, accumulate=accumulate))
    recipe = generator_recipe(stage, SMALL.complete(SPEC, INFO), Table(), {})
    state = jax.jit(recipe.init)(jax.random.key(0))
    batch = {"tokens": jnp.zeros((4, 6, 1), jnp.int32), "label": jnp.arange(4) % 3}
    state, metrics = recipe.update(state, {}, batch, jax.random.key(1))
    assert "memory" not in metrics
    assert state.extra["memory"]["seen"].sum() == 4
    assert ((state.extra["memory"]["squares"] > 0) == (state.extra["memory"]["seen"] > 0)).all()


class Table:
    """A tokenizer of which nothing is asked."""

    def apply(self, *arguments):
        raise AssertionError


def test_conditions_for_networks_with_tables_of_their_own():
    drop, label = jnp.array([False, True, False]), {"label": jnp.array([1, 0, 3])}
    np.testing.assert_array_equal(Classes(classes=3)(label, drop).mod, np.eye(4)[[1, 3, 3]])
    alike = Classes(none=False, classes=3)(label, drop).mod
    np.testing.assert_allclose(alike, [[0, 1, 0], [1 / 3] * 3, [1 / 3] * 3], rtol=1e-6)
    text = {"text": np.full((3, 2, 4), 2, np.float32), "text_mask": np.array([[0, 1]] * 3, bool)}
    cond = Features(rows=2, features=4).apply({"params": {"empty": jnp.ones((2, 4))}}, text, drop)
    np.testing.assert_allclose(cond.rows[:, 0, 0], [0.5, 1, 0.5], rtol=1e-6)
    np.testing.assert_array_equal(cond.valid, [[0, 1], [1, 1], [0, 1]])
    np.testing.assert_array_equal(Features(False, rows=2, features=4).apply({}, text, drop).rows[1], 0)


def test_first_hitting_picks_every_slot_once_in_any_order_and_its_times_fall():
    uniform = np.random.default_rng(0).random((2000, 4)).astype(np.float32)
    slots = np.asarray(picked(jnp.asarray(uniform), jnp.ones((2000, 4), bool)))
    assert (np.sort(slots, axis=1) == np.arange(4)).all()
    orders, counts = np.unique(slots, axis=0, return_counts=True)
    assert len(orders) == 24
    assert ((counts - 2000 / 24) ** 2 / (2000 / 24)).sum() < 49.7, "chi-square of 23 degrees, one in a thousand"
    chances = np.asarray(hitting_chances(jnp.asarray(uniform), 4))
    np.testing.assert_allclose(chances.mean(0), np.cumprod([4 / 5, 3 / 4, 2 / 3, 1 / 2]), atol=0.02)
    for curve in ("linear", "cos", "square", "root", "log"):
        process = Hide(8, curve)
        np.testing.assert_allclose(hitting_times(process.left()[1][:-1], curve), np.arange(1, 8) / 8, atol=1e-5)
    assert FirstHitting(4)(SPEC, jax.random.split(jax.random.key(0), 2), 2).sizes == (2, 1, 1, 2)


def test_probabilities_go_on_as_they_have_changed():
    past, odds = jnp.array([[[0.5, 0.5]]]), jnp.array([[[0.6, 0.4]]])
    time, before, hit = jnp.array([0.8]), jnp.array([1.0]), jnp.array([[0.7]])
    np.testing.assert_allclose(onward(odds, past, time, before, hit), [[[0.65, 0.35]]], rtol=1e-5)
    np.testing.assert_allclose(onward(odds, 0 * past, time, jnp.array([jnp.inf]), hit), odds, rtol=1e-6)


def test_what_does_not_fit_is_refused():
    complete = functools.partial(SMALL.complete, info=INFO)
    with pytest.raises(
        ValueError, match=r"needs one grid of tokens of one code, but the tokenizer gives codes \(4, 4\) in"
    ):
        complete(TokenSpec(grid(2, 2), codes=(4, 4)))
    with pytest.raises(ValueError, match=r"needs one grid .* in grids \(\(1, 1\), \(2, 2\)\)"):
        complete(TokenSpec(pyramid((1, 2)), codes=(4,)))
    with pytest.raises(ValueError, match=r"generator\.reveal is 'purity', but Uniform hides no codes"):
        SMALL.clone(process=Uniform(4), reveal="purity").complete(SPEC, INFO)
    with pytest.raises(ValueError, match=r"process\.keep and process\.hide are 0\.5 and 0\.6 at the last time"):
        MaskAndReplace(5, (0.9, 0.5), (0.0, 0.6))
    with pytest.raises(ValueError, match=r"backbone\.places is \(1, 2\), but there are 6 tokens"):
        CodeTransformer(1, 8, 2, places=(1, 2)).complete(SPEC)
    with pytest.raises(ValueError, match=r"backbone\.mult is \(2, 4\); it must begin with 1"):
        CodeUNet(8, (2, 4)).complete(SPEC)
    with pytest.raises(
        ValueError, match=r"backbone\.mult has 2 levels, but the grid of 2x3 tokens cannot be halved 1 times"
    ):
        CodeUNet(8, (1, 2)).complete(SPEC)
    with pytest.raises(ValueError, match=r"conditioning is Features but the data gives no caption features"):
        SMALL.clone(conditioning=Features()).complete(SPEC, INFO)
