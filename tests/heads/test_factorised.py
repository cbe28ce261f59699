"""The head of factorised tokens, its rules of guidance and temperature, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from flax.traverse_util import flatten_dict

from ar_jax.decode.guidance import BySubCode
from ar_jax.decode.temperature import BySubCode as Temperatures
from ar_jax.generators.base import Knobs
from ar_jax.generators.inputs import Previous
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.transformer import Transformer
from ar_jax.orders import raster
from ar_jax.tokens import TokenSpec, grid

CASE = CASES["open_magvit2"]


def test_tokens_are_drawn_from_the_product_of_both_softmaxes_and_their_log_probability_is_told():
    """4,000 draws from one hidden row; the second sub-code's distribution depends on the first."""
    h = jax.random.normal(jax.random.key(0), (1, 1, 16))
    knobs = Knobs(jnp.ones(1), jnp.ones((1, 2)))

    @jax.jit
    def run(params):
        def draw(self):
            every = jnp.stack(jnp.meshgrid(jnp.arange(12), jnp.arange(16), indexing="ij"), -1).reshape(1, -1, 2)
            first, second = self.head(jnp.broadcast_to(h, (1, 192, 16)), every)
            drawn = self.head.decide(
                jnp.broadcast_to(h, (1, 4000, 16)), jax.random.split(jax.random.key(1), (1, 4000)), knobs, 0
            )
            losses = self.head.loss(jnp.broadcast_to(h, (1, 192, 16)), every)
            return first[0, 0], second[0, :, :], losses[0], drawn

        return CASE.generator.apply({"params": params}, method=draw)

    first, second, losses, (tokens, sure) = run(CASE.params)
    want = jax.nn.softmax(first)[:, None] * jax.nn.softmax(second.reshape(12, 16, 16)[:, 0])
    np.testing.assert_allclose(np.exp(-losses).reshape(12, 16), want, rtol=1e-4)
    found = np.zeros((12, 16))
    np.add.at(found, tuple(np.asarray(tokens[0]).T), 1)
    likely = np.asarray(want) > 0.003
    chi = (np.square(found - 4000 * want) / (4000 * want))[likely].sum()
    assert chi < likely.sum() + 5 * np.sqrt(2 * likely.sum())
    np.testing.assert_allclose(sure[0], np.log(np.asarray(want))[tuple(np.asarray(tokens[0]).T)], rtol=1e-3, atol=1e-4)


def test_rules_by_sub_code_give_a_number_for_each_and_are_held_to_their_count():
    order, spec = raster(CASE.generator.spec), CASE.generator.spec
    np.testing.assert_array_equal(BySubCode(1.5, (2.0,))(order, spec), np.tile(np.float32([1.5, 2]), (12, 1)))
    np.testing.assert_array_equal(Temperatures(0.5)(order, spec), np.full(12, np.float32(0.5)))
    with pytest.raises(
        ValueError, match=r"guidance\.others is \(2\.0, 3\.0\), but tokens have 2 sub-codes; give 1 numbers"
    ):
        BySubCode(1.0, (2.0, 3.0))(order, spec)
    with pytest.raises(ValueError, match=r"temperature\.value is -1"):
        Temperatures(1.0, (-1,))


def test_what_it_cannot_serve_is_refused():
    generator, head, two = CASE.generator, CASE.generator.head, TokenSpec(grid(3, 4), codes=(12, 16))
    with pytest.raises(ValueError, match="Factorised needs tokens of codes"):
        head.complete(TokenSpec(grid(1, 2), channels=3))
    with pytest.raises(
        ValueError, match=r"head\.order is \(0, 2\); it must have each of the tokenizer's 2 sub-codes once"
    ):
        head.clone(order=(0, 2)).complete(two)
    with pytest.raises(ValueError, match=r"head\.guided is 'row'; it must be logits or rows"):
        head.clone(guided="row").complete(two)
    for other, words in (
        (
            head.clone(net=Transformer(1, 8, 2, hidden=24)),
            r"head\.net\.width is 8; it must be 16, that of the generator's",
        ),
        (Categorical(codes=12), "inputs.shared is True, but Categorical has no tables to look codes up in"),
    ):
        with pytest.raises(ValueError, match=words):
            jax.eval_shape(generator.clone(head=other).init_params, jax.random.key(0))


def test_tables_are_the_heads_and_only_inputs_that_share_them_need_the_last():
    def shapes(generator):
        return flatten_dict(jax.eval_shape(generator.init_params, jax.random.key(0)), sep="/")

    shared, own = shapes(CASE.generator), shapes(CASE.generator.clone(inputs=Previous(16, CASE.generator.spec)))
    assert {name for name in shared if "inputs" in name or "tables" in name} == {
        f"head/tables_{j}/embedding" for j in range(2)
    }
    assert {name for name in own if "inputs" in name or "tables" in name} == {
        "inputs/code_0/embedding", "inputs/code_1/embedding", "head/tables_0/embedding",
    }  # fmt: skip
