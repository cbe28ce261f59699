"""Keys and values in a byte each: what it costs in accuracy, and what it saves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from cases_continuous import CASES as CONTINUOUS
from cases_flow import CASES as FLOW

from ar_jax.decode.guidance import Interval
from ar_jax.decode.jacobi import Jacobi
from ar_jax.decode.logits import Filter
from ar_jax.decode.sampling import Sampling
from ar_jax.decode.sequential import Claim, Sequential, Task
from ar_jax.decode.temperature import Constant
from ar_jax.generators.base import State
from ar_jax.generators.causal import Causal
from ar_jax.nets.attention import Int8, Sight, attend
from ar_jax.nets.conditioning import Label
from ar_jax.nets.transformer import Transformer
from ar_jax.orders import raster, to_ranks
from ar_jax.tokens import TokenSpec, grid


def test_numbers_are_off_by_half_a_unit_at_most():
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 16)) * jnp.logspace(-20, 20, 5)[:, None]
    packed = Int8.of(x)
    assert packed.numbers.dtype == jnp.int8
    assert bool((jnp.abs(packed.plain() - x) <= 0.5001 * packed.unit).all())
    whole = jax.random.randint(jax.random.key(1), (4, 16), -127, 128).at[:, 0].set(127)
    np.testing.assert_array_equal(Int8.of(whole.astype(jnp.float32)).numbers, whole)
    assert not Int8.of(jnp.zeros((3, 4))).plain().any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attention_over_bytes_is_that_over_what_they_stand_for(dtype):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 3, rows, 64), dtype) for i, rows in enumerate((4, 50, 50)))
    mask = jnp.tril(jnp.ones((4, 50), bool), 46)[None]
    packed, exact = (Int8.of(k), Int8.of(v)), attend(q, k, v, mask).astype(jnp.float32)
    out = attend(q, *packed, mask).astype(jnp.float32)
    near = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(out, attend(q, *(x.plain() for x in packed), mask).astype(jnp.float32), atol=near)
    error = float(jnp.sqrt(jnp.square(out - exact).mean() / jnp.square(exact).mean()))
    assert 0 < error < 0.01 + near / 2
    fused = Sight(mask, fuse=True)  # kernels take what the bytes stand for
    if dtype == jnp.float32:
        np.testing.assert_allclose(fused(q, *packed), out, atol=1e-5)


def drawn(case, decoder, count=2):
    generator, params = case.generator.unrolled(case.params)
    order = case.order(generator.spec, None, count)
    batch, sampling = jax.tree.map(lambda x: x[:count], case.batch), Sampling(Interval(1.5), decoder=decoder)
    keys = jax.random.split(jax.random.key(0), count)
    tokens = lambda params: sampling.tokens(generator, params, batch, order, tokenizer=case.tokenizer, keys=keys)[0]  # noqa: E731
    return np.asarray(jax.jit(tokens)(params))


@pytest.mark.parametrize("name", ["llamagen_caption", "var"])
def test_rows_over_a_cache_in_bytes_are_off_by_less_than_three_percent(name):
    """Of the last of some steps, from a cache that all rows before were written into."""
    case, hidden = CASES[name], {}
    order = case.order(case.generator.spec, None, case.images)
    knobs = Sampling().knobs(order, case.generator.spec)

    for kept in ("own", "int8"):

        @jax.jit
        def rows(params, tokens, kept=kept):
            task = Task(case.generator, params, case.batch, order, knobs, jax.random.split(jax.random.key(0), case.images),
                        tokenizer=case.tokenizer)  # fmt: skip
            setting = task.setting(kept)
            state = task.call(task.begin(setting), order.n, setting, method="grow")
            first = 0
            for size in order.sizes[:5]:
                h, cache = task.call(State(tokens, state.cache), first, size, setting, method="rows")
                state, first = State(tokens, cache), first + size
            return h

        hidden[kept] = np.asarray(rows(case.params, to_ranks(case.tokens, order)))
    error = np.sqrt(np.square(hidden["int8"] - hidden["own"]).mean() / np.square(hidden["own"]).mean())
    assert 0 < error < 0.03


@pytest.mark.parametrize("case", [FLOW["flowar"], FLOW["xar_cells"], CONTINUOUS["givt"]], ids=["flowar", "xar", "givt"])
def test_every_cache_can_be_kept_in_bytes(case):
    order, keys = case.ordered(), jax.random.split(jax.random.key(0), case.images)
    knobs = Sampling().knobs(order, case.generator.spec)

    def draw(params):
        task = Task(case.generator, params, case.batch, order, knobs, keys, tokenizer=getattr(case, "tokenizer", None))
        setting = task.setting("int8")
        state = task.call(task.begin(setting), order.n, setting, method="grow")
        return state.cache, Sequential(cache="int8")(task)[0]

    cache, tokens = jax.eval_shape(draw, case.params)
    kept = [x for x in jax.tree.leaves(cache) if x.shape[-1] > 1]
    assert {x.dtype.name for x in kept} == {"int8"}
    assert {x.shape[-2] for x in kept} == {case.generator.spec.n}
    assert tokens.shape == case.tokens.shape


def test_jacobi_draws_with_a_cache_in_bytes_what_one_by_one_draws_with_it():
    case = CASES["llamagen_label"]
    np.testing.assert_array_equal(drawn(case, Jacobi(4, "int8")), drawn(case, Sequential(cache="int8")))
    assert Jacobi(4, "int8").claim is Sequential(cache="int8").claim is Claim.APPROXIMATE
    assert Sequential().claim is Claim.SAME_TOKENS


def test_what_keeps_no_cache_and_unknown_ways_are_refused():
    with pytest.raises(ValueError, match=r"decoder\.cache is 'int8', but this Hmar keeps no cache"):
        drawn(CASES["hmar"], Sequential(cache="int8"))
    with pytest.raises(ValueError, match=r"decoder\.cache is 'int4'; it must be one of own, int8"):
        Sequential(cache="int4")


def test_a_cache_in_bytes_takes_less_memory_by_the_compilers_count():
    """36 bytes of a row and head in place of 128; on a CPU some layers' numbers are float32 while they are multiplied."""
    spec = TokenSpec(grid(16, 16), codes=(16,))
    generator = Causal(Transformer(8, 64, 2, hidden=64), Label(64, classes=3)).on(spec)
    shapes, order = jax.eval_shape(generator.init_params, jax.random.key(0)), raster(spec)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 32))

    def memory(kept):
        sampling = Sampling(Interval(1.5), Constant(), Filter(), Sequential(cache=kept))
        batch = {"label": jnp.zeros(32, jnp.int32)}

        def draw(params, keys):
            module, params = generator.unrolled(params)
            return sampling.tokens(module, params, batch, order, keys=keys)[0]

        return jax.jit(draw).lower(shapes, keys).compile().memory_analysis().temp_size_in_bytes

    own, packed = memory("own"), memory("int8")
    cache = 2 * 8 * 64 * 256 * 64 * 4
    assert own > cache
    assert own - packed > 0.3 * cache
    size = lambda kept: sum(x.nbytes for x in jax.tree.leaves(generator.backbone.empty_cache(2, kept).grow(8)))  # noqa: E731
    assert size("int8") / size("own") == 36 / 128
