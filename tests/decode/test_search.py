"""Search: candidates that a judge chooses among while they are drawn."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from small_models import IMAGES, KEYS, LABELS, order_of, program, ready

from ar_jax.decode.guidance import Interval
from ar_jax.decode.judges import ByClass, Ensemble, SmallNetwork, by_rank, by_score
from ar_jax.decode.sampling import Sampling
from ar_jax.decode.search import BestOf, Search, doubling, even
from ar_jax.decode.sequential import Sequential
from ar_jax.decode.temperature import Constant
from ar_jax.evals.classifier import SmallNet
from ar_jax.tokens import MOST


@dataclasses.dataclass(frozen=True)
class Bright:
    """Likes bright images, or dark ones: its parameter is a sign."""

    sign: float = 1.0

    def open(self):
        return jnp.float32(self.sign)

    def __call__(self, params, images, batch):
        return params * images.mean((2, 3, 4))


WAY = Sampling(Interval(1.5))


def sampling(decoder, **parts):
    return dataclasses.replace(WAY, decoder=decoder, **parts)


def drawn(name, decoder, extra=None, keys=KEYS, **parts):
    """Images and account; jitted anew."""
    run, arguments = program(name, sampling(decoder, **parts))
    return jax.tree.map(np.asarray, run(*arguments, extra))


@functools.cache
def plain(name):
    return drawn(name, Sequential())


@pytest.mark.parametrize("fields", [{"branch": "whole"}, {"branch": "last", "every": 3}])
def test_without_a_choice_the_images_are_those_of_sequential(fields):
    images, account = drawn("causal", Search(Bright(), beams=1, candidates=1, **fields))
    np.testing.assert_array_equal(images, plain("causal")[0])
    np.testing.assert_array_equal(account.calls["generator"], plain("causal")[1].calls["generator"])
    assert account.accepted.sum() == 16 * IMAGES


def test_best_of_is_the_best_of_images_drawn_one_by_one():
    images, account = drawn("causal", BestOf(3, Bright()))
    tokenizer, generator, params, frozen = ready("causal")

    @jax.jit
    def one(keys):
        return WAY.images(generator, tokenizer, params, frozen, LABELS, order_of("causal"), keys=keys)[0]

    keys = [
        KEYS,
        *(jax.vmap(functools.partial(lambda i, key: jax.random.fold_in(key, MOST + i), i))(KEYS) for i in (1, 2)),
    ]
    every = np.stack([one(keys) for keys in keys])
    best = every.mean((2, 3, 4)).argmax(0)
    np.testing.assert_allclose(images, every[best, np.arange(IMAGES)], atol=1e-5)
    np.testing.assert_array_equal(account.calls["generator"], 3 * 16)
    np.testing.assert_array_equal(account.calls["judge"], 3)


def test_beams_go_on_from_their_own_prefix_and_one_program_serves_any_judge():
    """Drawn greedily, all but the codes before the stops are the likeliest ones after what is before them."""
    search = Search(Bright(), beams=3, candidates=4, every=4, branch="last", ahead=2)
    cold = sampling(search, temperature=Constant(0.0))
    tokenizer, generator, params, frozen = ready("causal")
    run, arguments = program("causal", cold)
    light, account = run(*arguments, jnp.float32(1))
    dark, _ = run(*arguments, jnp.float32(-1))
    assert run._cache_size() == 1
    assert (light.mean((1, 2, 3)) > dark.mean((1, 2, 3))).all()
    text = run.lower(*arguments, jnp.float32(1)).compile().as_text()
    assert not re.search(r"callback|infeed|outfeed|\b(send|recv)\(", text)
    # of one beam, then of three; lookahead of two steps, but not at the end
    np.testing.assert_array_equal(account.calls["judge"], 4 + 3 * 12)
    np.testing.assert_array_equal(account.calls["generator"], 4 + 3 * 12 + 2 * (4 + 2 * 12))

    call = functools.partial(tokenizer.apply, {"params": frozen})

    @jax.jit
    def found(params):
        task = cold.task(
            generator, params, LABELS, order_of("causal"), keys=KEYS, extra=jnp.float32(1),
            look=lambda tokens, known: call(jnp.where(known[..., None], tokens, 0), method="decode"),
        )  # fmt: skip
        tokens, kept = search.search(task)

        def logits(self, drop):
            return self.head(self.hidden(tokens, self.condition(LABELS, drop), order_of("causal")))

        cond, none = (
            generator.apply({"params": params}, jnp.full(IMAGES, drop), method=logits) for drop in (False, True)
        )
        return tokens, (none + 1.5 * (cond - none)).argmax(-1), kept

    tokens, likeliest, kept = found(params)
    free = np.arange(16) % 4 == 3
    np.testing.assert_array_equal(tokens[..., 0][:, ~free], likeliest[:, ~free])
    assert (tokens[..., 0][:, free] != likeliest[:, free]).any()
    np.testing.assert_array_equal(kept.tokens[-1, :, 0], tokens)
    first = np.asarray(kept.tokens[0, :, :, 3, 0])
    assert all(len(set(row)) == 3 for row in first.tolist()), "siblings differ"
    assert (np.diff(kept.scores, axis=-1) <= 0).all()


@pytest.mark.parametrize("name", ["scales", "maskgit"])
def test_scales_and_masked_generators_are_searched_as_well(name):
    images, account = drawn(name, Search(Bright(), beams=2, candidates=3))
    assert (images.mean((1, 2, 3)) > plain(name)[0].mean((1, 2, 3))).all()
    steps, stops = len(order_of(name).sizes), len(doubling(len(order_of(name).sizes)))
    np.testing.assert_array_equal(account.calls["judge"], 3 + 6 * (stops - 1))
    np.testing.assert_array_equal(account.calls["generator"], 3 + 6 * (steps - 1))


def test_stops():
    assert doubling(8) == (1, 2, 4, 8)
    assert doubling(12) == (1, 2, 4, 8, 12)
    assert doubling(9, 3) == (1, 2, 4)
    assert even(3, 8) == (3, 6, 8)
    assert doubling(1) == even(5, 1) == (1,)


def test_a_judge_of_classes_reads_its_file_and_gives_the_log_probability_of_the_one_asked_for(tmp_path):
    random, shapes = (
        np.random.default_rng(0),
        jax.eval_shape(SmallNet(3).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3))),
    )
    params = jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), shapes["params"])
    flat = {f"{layer}/{leaf}": x for layer, tree in params.items() for leaf, x in tree.items()}
    save_file(flat, tmp_path / "judge.safetensors")
    judge = ByClass(SmallNetwork(str(tmp_path / "judge.safetensors")))
    read, images = judge.open(), random.uniform(-1, 1, (2, 3, 8, 8, 3)).astype(np.float32)
    jax.tree.map(np.testing.assert_array_equal, read, params)
    scores, logits = jax.jit(
        lambda params: (
            judge(params, images, {"label": jnp.array([2, 0])}),
            SmallNet(3).apply({"params": params}, images[1]),
        )
    )(read)
    np.testing.assert_allclose(scores[1], jax.nn.log_softmax(logits)[:, 0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="ByClass judges classes, but this model is not asked for one"):
        judge(read, images, {})


def test_ensembles_by_hand():
    scores = jnp.array([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0]])
    np.testing.assert_allclose(by_score(scores, np.float32([2, 1])), [0, 2, 1], atol=1e-6)
    np.testing.assert_allclose(by_rank(scores[:1], np.float32([2])), [0, 1, 0.5], atol=1e-6)
    both = Ensemble((Bright(), Bright(-1.0)), (1.0, 3.0))
    images = jnp.arange(2.0)[None, :, None, None, None] * jnp.ones((1, 2, 1, 1, 1))
    np.testing.assert_allclose(both(both.open(), images, {}), [[0.75, 0.25]])


@pytest.mark.parametrize(
    ("name", "decoder", "parts", "message"),
    [
        ("maskgit", Search(Bright(), branch="last"), {}, r"decoder\.branch is 'last', which takes causal generators"),
        ("causal", Search(Bright(), stops=(4, 17)), {}, r"decoder\.stops is \(4, 17\), but there are 16 steps to draw"),
        (
            "causal",
            Search(Bright()),
            {"soft": True},
            r"soft draws mixtures of codes, of which there is nothing to choose",
        ),
        (
            "causal",
            Search(),
            {},
            r"decoder\.judge\.network\.path is '', which is no file; python -m ar_jax\.decode\.judges",
        ),
    ],
)
def test_what_cannot_be_searched_is_refused(name, decoder, parts, message):
    run, arguments = program(name, sampling(decoder, **parts))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(run, *arguments, None)


def test_what_makes_no_images_and_stops_that_fall_are_refused():
    _, generator, params, _ = ready("causal")
    with pytest.raises(ValueError, match="decoder Search judges images, but whoever draws here makes none"):
        sampling(Search(Bright())).tokens(generator, params, LABELS, order_of("causal"), keys=KEYS)
    with pytest.raises(ValueError, match=r"decoder\.stops is \(4, 2\); they must rise"):
        Search(Bright(), stops=(4, 2))
    with pytest.raises(ValueError, match="2 judges and 1 weights"):
        Ensemble((Bright(), Bright()), (1.0,))
