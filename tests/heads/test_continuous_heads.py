import functools

import head_distributions
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ar_jax.generators.base import Knobs
from ar_jax.generators.masked import MaskRatio
from ar_jax.heads.diffusion import Chain, Diffusion, cosine_betas, kept_steps
from ar_jax.heads.flow import Flow, uniform
from ar_jax.heads.gaussian_mixture import GaussianMixture, Guided, Mixture
from ar_jax.heads.integrate import annealed, integrate
from ar_jax.tokens import TokenSpec, grid


def error(solver, steps):
    """Of dx/dt = x from t = 1 to 0, whose end is x(1) / e."""
    end = integrate(lambda x, t: x, jnp.ones(()), uniform(steps), solver=solver)
    return abs(float(end) - np.exp(-1))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_solvers_have_their_order(solver, order):
    assert error(solver, 16) / error(solver, 32) == pytest.approx(2**order, rel=0.15)


def test_a_velocity_that_changes_with_time_is_taken_at_the_right_times():
    end = integrate(lambda x, t: t, jnp.zeros(()), np.array([1, 0.6, 0]))
    assert float(end) == pytest.approx(-0.4 * 1 - 0.6 * 0.6)
    end = integrate(lambda x, t: t, jnp.zeros(()), np.array([1, 0.6, 0]), solver="midpoint")
    assert float(end) == pytest.approx(-0.5)


def gauss(x, t, mean=1.5, std=0.5):
    """The velocity towards a Gaussian: mean of noise - data given (1 - t) data + t noise."""
    spread = (1 - t) ** 2 * std**2 + t**2
    return -mean + (t - (1 - t) * std**2) / spread * (x - (1 - t) * mean)


@pytest.mark.parametrize("solver", ["euler", "heun", "stochastic"])
def test_every_solver_ends_in_the_distribution_of_the_data(solver):
    keys = jax.random.split(jax.random.key(0), 301)
    noise = lambda i: jax.random.normal(jnp.take(keys, i), (20000,))  # noqa: E731
    times = np.append(np.linspace(1, 0.01, 300), 0)
    end = jax.jit(lambda: integrate(gauss, noise(300), times, solver=solver, noise=noise))()
    assert float(end.mean()) == pytest.approx(1.5, abs=0.02)
    assert float(end.std()) == pytest.approx(0.5, abs=0.02)


def test_fewer_steps_of_a_shared_array_of_times_may_be_taken():
    table = jnp.array([1, 0.5, 0, 0, 0.0])
    run = jax.jit(lambda steps: integrate(lambda x, t: x + t, jnp.ones(()), table, steps=steps))
    np.testing.assert_allclose(run(2), integrate(lambda x, t: x + t, jnp.ones(()), table[:3]))


def test_unknown_solvers_and_missing_noise_are_refused():
    with pytest.raises(ValueError, match="solver is 'rk4'; it must be one of euler, heun"):
        integrate(gauss, jnp.ones(()), uniform(2), solver="rk4")
    with pytest.raises(ValueError, match="stochastic solver needs noise"):
        integrate(gauss, jnp.ones(()), uniform(2), solver="stochastic")


def test_annealing_goes_from_many_steps_to_few():
    assert annealed("linear", 10, 2, 5).tolist() == [10, 8, 6, 4, 2]
    assert annealed("cosine", 10, 2, 3).tolist() == [10, 6, 2]
    assert annealed("two_stage", 10, 2, 4).tolist() == [10, 10, 2, 2]
    assert annealed("constant", 10, 2, 2).tolist() == [10, 10]
    assert annealed("linear", 25, 15, 5).tolist() == [25, 22, 20, 17, 15]  # FlowAR's
    with pytest.raises(ValueError, match="rule is 'step'"):
        annealed("step", 10, 2, 4)


@pytest.mark.parametrize("spacing", ["", "0", "0,0", "ten", "ddim", "ddim0", "ddim3,4", "600,600", "1001", "-4"])
def test_spacings_that_mean_nothing_are_refused(spacing):
    with pytest.raises(ValueError, match=r"head\.steps is"):
        kept_steps(spacing)


@pytest.mark.parametrize(
    ("spacing", "kept"),
    [
        ("3,0", [0, 250, 499]),
        ("0,1,2", [334, 667, 999]),
        ("2,1,0,3", [0, 249, 250, 750, 874, 999]),
        ("ddim3", [0, 334, 668]),
    ],
)
def test_sections_keep_their_numbers_of_steps(spacing, kept):
    np.testing.assert_array_equal(kept_steps(spacing), kept)


def test_a_chain_over_fewer_levels_keeps_their_noise():
    kept = np.cumprod(1 - cosine_betas())
    some = kept_steps("10")
    chain = Chain.of(some)
    np.testing.assert_allclose(np.cumprod(1 - np.exp(chain.log_beta)), kept[some], rtol=1e-5, atol=1e-8)
    assert (some[0], some[-1], len(some)) == (0, 999, 10)
    np.testing.assert_array_equal(kept_steps("10", latest=900)[-1], 900)


def test_mask_ratios_follow_the_truncated_normal():
    ratio = jax.vmap(MaskRatio().draw)(jax.random.split(jax.random.key(0), 4000))
    assert 0.7 <= float(ratio.min()) < 0.71
    assert 0.99 < float(ratio.max()) <= 1
    want = stats.truncnorm(-0.3 / 0.25, 0, 1, 0.25).mean()
    assert float(ratio.mean()) == pytest.approx(want, abs=0.005)


def test_the_density_of_a_mixture_is_that_of_scipy():
    random = np.random.default_rng(0)
    logits, mean = random.normal(size=3), random.normal(size=(3, 2))
    scale, x = random.uniform(0.5, 2, size=(3, 2)), random.normal(size=(5, 2))
    weight = np.exp(logits) / np.exp(logits).sum()
    want = np.log(sum(w * stats.norm(m, s).pdf(x).prod(-1) for w, m, s in zip(weight, mean, scale)))
    every = [np.broadcast_to(a.astype(np.float32), (5, *a.shape)) for a in (logits, mean, scale)]
    np.testing.assert_allclose(Mixture(*every).log_density(x.astype(np.float32)), want, rtol=1e-5)


def test_guided_draws_follow_the_product_of_powers():
    one = jnp.ones(20000)
    target = Guided(one * 1.0, one * 0.8, one * 0.0, one * 1.5, 1.6)
    precision = 1.6 / 0.8**2 - 0.6 / 1.5**2
    keys = jax.random.split(jax.random.key(0), 2000).reshape(1000, 2)
    numbers = lambda j: (  # noqa: E731
        jax.random.normal(keys[j, 0], one.shape),
        jax.random.uniform(keys[j, 1], one.shape),
    )
    x, accepted = jax.jit(lambda: target.draw(numbers, one * 100, 1000))()
    assert bool(accepted.all())
    assert float(x.mean()) == pytest.approx(1.6 / 0.8**2 / precision, abs=0.02)
    assert float(x.std()) == pytest.approx(precision**-0.5, abs=0.02)


def test_heads_refuse_codes_and_settings_they_do_not_know():
    spec = TokenSpec(grid(2, 2), codes=(7,))
    for head in (Diffusion(), Flow(), GaussianMixture()):
        with pytest.raises(ValueError, match=f"{type(head).__name__} needs continuous tokens"):
            head.complete(spec)
    with pytest.raises(ValueError, match=r"head\.sampler is 'dpm'"):
        Diffusion(8, 1, 2, sampler="dpm").init(jax.random.key(0), jnp.ones((1, 1, 3)), jnp.ones((1, 1, 2)),
                                               key=jax.random.key(0), method="loss")  # fmt: skip


HEADS = {
    "diffusion": Diffusion(32, 2, multiplier=1, steps="50", latest=950),
    "flow": Flow(32, 2, multiplier=1, steps=20, solver="heun"),
    "mixture": GaussianMixture(4),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_learn_a_known_distribution(name):
    real = head_distributions.true(head_distributions.line, 4, 2048)[1][0]
    learn = functools.partial(head_distributions.learned, HEADS[name], head_distributions.line, count=2048, batch=512)
    far = head_distributions.distance(learn(updates=1), real)
    near = head_distributions.distance(learn(updates=400), real)
    assert near < 0.15 < 0.3 < far
    mirrored = real.reshape(-1, 2)[:, ::-1].reshape(-1, 1)
    assert head_distributions.distance(mirrored, real) > 0.5, "the label does not matter to the figure"


def test_guidance_of_weight_one_changes_nothing():
    h = jax.random.normal(jax.random.key(1), (4, 3, 8))
    keys = jax.random.split(jax.random.key(0), (2, 3))
    for head in (Diffusion(8, 1, 2, steps="4,1"), Flow(8, 1, 2, steps=3)):
        shapes = jax.eval_shape(
            functools.partial(head.init, method="loss"),
            jax.random.key(0), h, jnp.ones((4, 3, 2)), key=jax.random.key(0),
        )  # fmt: skip
        params = jax.tree.map(lambda x: 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), shapes)
        draw = functools.partial(head.apply, params, method="sample")
        one, two = (Knobs(np.full(1, w, np.float32), np.ones(1, np.float32)) for w in (1, 2))
        plain = draw(h[::2], keys, one, 0)
        np.testing.assert_allclose(draw(h, keys, one, 0), plain, rtol=1e-4, atol=1e-4)
        assert np.abs(draw(h, keys, two, 0) - plain).max() > 1e-2
