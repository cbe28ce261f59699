"""Token-Shuffle: which tokens a row carries and where they come out again, what it is without cells, steps, edits, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import random_params

from ar_jax.data import Info
from ar_jax.decode.edit import Source
from ar_jax.decode.guidance import Rising
from ar_jax.decode.sampling import Sampling
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import Previous
from ar_jax.generators.token_shuffle import Merged, NextCell
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.conditioning import Label
from ar_jax.nets.transformer import Transformer
from ar_jax.orders import Cells, raster, to_ranks
from ar_jax.tokens import TokenSpec, grid, pyramid

SPEC, INFO = TokenSpec(grid(2, 4), codes=(9,)), Info(classes=3)
NET = {"layers": 2, "width": 16, "heads": 2, "hidden": 24}
TOKENS = np.random.default_rng(0).permutation(8).astype(np.int32).reshape(1, 8, 1)


def model(side=2, blocks=1, spec=SPEC, **net):
    return NextCell(Transformer(**NET | {"final": False} | net), Label(16), inputs=Merged(side=side, blocks=blocks)).complete(spec, INFO)


def test_a_row_carries_the_tokens_of_a_cell_and_they_come_out_where_they_were():
    generator, order = model(blocks=0), Cells(2)(SPEC)
    assert order.slot.tolist() == [[0, 1, 4, 5, 2, 3, 6, 7]]
    params = random_params(generator, 1.0)
    narrow = np.eye(16, 4, dtype=np.float32)  # the first four numbers of each vector
    params["inputs"]["compress"] = {"kernel": narrow, "bias": np.zeros(4, np.float32)}
    params["unmerged"] = {
        "expand": {"kernel": narrow.T, "bias": np.zeros(16, np.float32)}, "norm": {"scale": np.ones(16, np.float32)}
    }  # fmt: skip
    ranked = to_ranks(TOKENS, order)
    rows, back = generator.apply({"params": params}, method=lambda self: (
        x := self.inputs.embed(self.by_cell(ranked)), self.unmerged(x)
    ))  # fmt: skip
    first = params["inputs"]["embedding"][TOKENS[0, :, 0], :4].reshape(2, 4, 4)  # by row and column
    np.testing.assert_array_equal(rows[0], np.stack([first[:, :2], first[:, 2:]]).reshape(2, 16))
    want = np.concatenate([first[:, :2], first[:, 2:]]).reshape(8, 4)
    want = want / np.sqrt(np.square(want).sum(-1, keepdims=True) / 16 + 1e-5)
    np.testing.assert_allclose(back[0], np.pad(want, ((0, 0), (0, 12))), rtol=1e-5)


def test_cells_of_one_token_without_perceptrons_are_the_causal_model():
    generator, plain = model(1, 0, eps=0.1), Causal(Transformer(eps=0.1, **NET), Label(16)).complete(SPEC, INFO)
    params = random_params(generator, 0.3)
    moved = {name: tree for name, tree in params.items() if name != "unmerged"}
    moved["backbone"] = params["backbone"] | params["unmerged"]
    given = (TOKENS, {"label": jnp.array([1])}, raster(SPEC))
    loss, *_ = generator.apply({"params": params}, *given, drop=jnp.zeros(1, bool), method="loss")
    want, *_ = plain.apply({"params": moved}, *given, drop=jnp.zeros(1, bool), method="loss")
    np.testing.assert_array_equal(loss, want)


def test_a_cell_is_a_step_and_a_partly_known_one_keeps_its_tokens():
    generator, order = model(), Cells(2)(SPEC)
    params, keys = random_params(generator, 0.3), jax.random.split(jax.random.key(0), 1)
    known = np.isin(np.arange(8), [1, 2, 3, 4])[None]
    draw = jax.jit(lambda params, known: Sampling(Rising(3.0, "half_linear")).tokens(
        generator, params, {"label": jnp.array([1])}, order, keys=keys, source=Source(jnp.asarray(TOKENS), known)
    ))  # fmt: skip
    tokens, account = draw(params, known)
    assert (account.calls["generator"].tolist(), account.accepted.tolist()) == ([2], [[4, 4]])
    np.testing.assert_array_equal(tokens[known], TOKENS[known])
    free, _ = draw(params, np.zeros_like(known))
    np.testing.assert_array_equal(tokens[0, [0, 5]], free[0, [0, 5]])  # of the first cell, which nothing came before
    assert (free[known] != TOKENS[known]).any()


def test_guidance_rises_until_the_middle():
    spec = TokenSpec(grid(4, 8), codes=(9,))
    np.testing.assert_allclose(Rising(7.5, "half_linear")(Cells(2)(spec), spec), 1 + 6.5 * np.array([0, 1, 2, 3, 4, 4, 4, 4]) / 4)


def test_the_z_loss_is_of_the_softmax_denominator():
    head, h, target = Categorical(codes=9), np.ones((1, 2, 3), np.float32), np.array([[[2], [5]]])
    params = {"params": {"readout": {"kernel": np.random.default_rng(1).normal(size=(3, 9)).astype(np.float32)}}}
    plain, more = (each.apply(params, h, target, method="loss") for each in (head, head.clone(z_loss=0.1)))
    total = np.log(np.exp(head.apply(params, h)).sum(-1))
    np.testing.assert_allclose(more, plain + 0.1 * total**2, rtol=1e-5)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: model(3, width=18), r"inputs\.side is 3; tokens must lie in a grid of whole cells of 3x3, but these 8 lie in \(\(2, 4\),\)"),
        (lambda: model(spec=TokenSpec(pyramid((2, 4)), codes=(9,))), r"inputs\.side is 2; .* but these 20 lie in \(\(2, 2\), \(4, 4\)\)"),
        (lambda: model(width=18), r"inputs\.side is 2, but backbone\.width is 18; it must be a multiple of 4, the tokens of a cell"),
        (lambda: model(final=True), r"backbone\.final is True, but the last norm comes after cells are taken apart; give False"),
        (lambda: model().clone(inputs=Previous()).complete(SPEC, INFO), r"generator\.inputs must be a Merged, got Previous"),
        (lambda: model().inputs.check(raster(SPEC)), r"order\.sizes is \(1, 1, .*use orders\.Cells\(2\)"),
    ],
)  # fmt: skip
def test_what_has_no_cells_is_refused(ask, message):
    with pytest.raises(ValueError, match=message):
        ask()
