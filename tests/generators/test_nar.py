"""NAR: which tokens are neighbours, in which order they are drawn, what is refused."""

import numpy as np
import pytest

from ar_jax.data import Info
from ar_jax.generators.nar import Branched, Neighbouring, Neighbours, before
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.conditioning import Label
from ar_jax.orders import Diagonals, raster
from ar_jax.tokens import TokenSpec, grid, pyramid
from ar_jax.train.optim import Optim, schedule

INFO = Info(classes=3)


def model(**fields):
    return Neighbouring(Branched(2, 16, 2, hidden=24, **fields), Label(16))


def test_diagonals_go_from_the_top_row_down_and_neighbours_lie_in_the_one_before():
    spec = TokenSpec(grid(2, 3), codes=(5,))
    order = Diagonals(scans=1)(spec)
    assert (order.slot.tolist(), order.sizes, order.rooms) == ([[0, 1, 3, 2, 4, 5]], (1, 2, 2, 1), (2, 2, 2, 2))
    assert before(spec).tolist() == [[-1, -1], [0, -1], [1, -1], [-1, 0], [3, 1], [4, 2]]
    frames = TokenSpec(pyramid(((1, 2), (1, 2))), codes=(5,))
    assert before(frames).tolist() == [[-1, -1, -1], [0, -1, -1], [-1, -1, 0], [2, -1, 1]]
    for tokens in (spec, frames, TokenSpec(pyramid((3, 3, 3)), codes=(5,))):
        step = np.empty(tokens.n, int)
        step[Diagonals()(tokens).slot[0]] = Diagonals()(tokens).step
        earlier = np.where(before(tokens) < 0, step[:, None] - 1, step[before(tokens)])
        assert (earlier == step[:, None] - 1).all()


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: model().complete(TokenSpec(pyramid((1, 2)), codes=(5,)), INFO), r"full grids of one size, .* 5 in \(\(1, 1\), \(2, 2\)\)"),
        (lambda: model(ahead=3).complete(TokenSpec(grid(2, 2), codes=(5,)), INFO), r"backbone\.ahead is 3; it must be at most 2"),
        (lambda: model(line=True).complete(TokenSpec(grid(2, 2), codes=(5,)), INFO), r"backbone has line True"),
        (
            lambda: model().clone(head=Categorical()).complete(TokenSpec(grid(2, 2), codes=(5,)), INFO),
            r"generator\.head must be a ByAxis, got Categorical",
        ),
        (
            lambda: Neighbours(spec=TokenSpec(grid(2, 2), codes=(5,))).check(raster(TokenSpec(grid(2, 2), codes=(5,)))),
            r"order\.sizes is \(1, 1, 1, 1\)\.\.\.; use orders\.Diagonals\(\)",
        ),
    ],
)  # fmt: skip
def test_what_has_no_neighbours_is_refused(ask, message):
    with pytest.raises(ValueError, match=message):
        ask()


def test_the_learning_rate_falls_by_fifths():
    rate = schedule(Optim(lr=1.0, schedule="fifths"), 600)
    found = [float(rate(step)) for step in (0, 299, 300, 399, 400, 499, 500, 599)]
    np.testing.assert_allclose(found, [1, 1, 0.2, 0.2, 0.04, 0.04, 0.008, 0.008], rtol=1e-6)
