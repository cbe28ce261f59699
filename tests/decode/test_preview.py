"""Pictures of an image in the making: a glimpse after some steps, from the one compiled program that draws it."""

import re

import jax
import numpy as np
import pytest
from small_models import IMAGES, KEYS, LABELS, MODELS, order_of, program, ready

from ar_jax.decode.glimpse import glimpse, marks
from ar_jax.decode.guidance import Interval
from ar_jax.decode.jacobi import Jacobi
from ar_jax.decode.sampling import Sampling


def test_steps_are_all_or_double_or_are_spread():
    assert marks(3, 8) == (1, 2, 3)
    assert marks(10, 8) == (1, 2, 4, 8, 10)
    assert marks(64, 8) == (1, 2, 4, 8, 16, 32, 64)
    assert marks(256, 8) == (1, 2, 5, 11, 24, 53, 116, 256)
    assert marks(256, 1) == (256,)


@pytest.mark.parametrize("name", MODELS)
def test_a_strip_shows_what_is_known_after_each_step_and_ends_in_the_image(name):
    run, arguments = program(name, preview=5)
    strips, account = run(*arguments)
    whole, plain = program(name)[0](*arguments)
    np.testing.assert_allclose(strips[:, -1], whole, atol=1e-5)
    np.testing.assert_array_equal(account.calls["generator"], plain.calls["generator"])
    text = run.lower(*arguments).compile().as_text()
    assert not re.search(r"callback|infeed|outfeed|\b(send|recv)\(", text)

    tokenizer, generator, params, frozen = ready(name)
    order, steps = order_of(name), marks(len(order_of(name).sizes), 5)
    assert strips.shape == (IMAGES, len(steps), 8, 8, 3)
    tokens, _ = jax.jit(
        lambda params: Sampling(Interval(1.5)).tokens(
            generator, params, LABELS, order, keys=KEYS,
            tokenizer=lambda *at, method: tokenizer.apply({"params": frozen}, *at, method=method),
        )
    )(params)  # fmt: skip
    call = jax.jit(
        lambda known: glimpse(
            tokenizer, lambda *at, method: tokenizer.apply({"params": frozen}, *at, method=method), tokens, known
        )
    )
    if name == "maskgit":  # which slots come when is found while they are drawn
        grey = (np.asarray(strips) == 0).all(-1).reshape(IMAGES, len(steps), -1).sum(-1)
        cell = 64 // tokenizer.spec.n
        np.testing.assert_array_equal(grey, cell * (tokenizer.spec.n - np.cumsum(order.sizes)[None]) + 0 * grey)
        return
    for j, step in enumerate(steps):
        known = np.zeros((IMAGES, tokenizer.spec.n), bool)
        slot = np.broadcast_to(order.slot, known.shape)[:, : sum(order.sizes[:step])]
        np.put_along_axis(known, slot, True, axis=1)
        np.testing.assert_allclose(strips[:, j], call(known), atol=1e-5)


def test_of_another_decoder_the_tokens_so_far_are_shown_in_the_order_of_its_generator():
    ours, arguments = program("causal", preview=5)
    other = program("causal", Sampling(Interval(1.5), decoder=Jacobi(4)), preview=5)[0]
    np.testing.assert_allclose(other(*arguments)[0], ours(*arguments)[0], atol=1e-5)
