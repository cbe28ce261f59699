"""DetailFlow: images that grow with the number of codes, mistakes that are made up for, groups that are drawn at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import initial_params, never_moved, random_params

from ar_jax.config import GeneratorStage
from ar_jax.data import Info
from ar_jax.decode.glimpse import glimpse
from ar_jax.generators.causal import Causal
from ar_jax.generators.detailflow import CONDITION, Gradual, Grouped, Groups, carried
from ar_jax.nets.conditioning import Label
from ar_jax.nets.transformer import Transformer
from ar_jax.nets.vit import Siglip
from ar_jax.orders import Order
from ar_jax.tokenizers.detailflow import DetailFlow
from ar_jax.tokenizers.flextok import FlexTok
from ar_jax.tokenizers.patches import Patches
from ar_jax.tokens import TokenSpec, grid
from ar_jax.train.losses import Losses
from ar_jax.train.recipes import generator_loss, generator_recipe
from ar_jax.train.tokenizer import tokenizer_gradients

NET = {"width": 16, "heads": 2, "hidden": 24}
TINY = DetailFlow(
    (12, 12), 4, 8, 2, 2, Siglip(1, **NET), Siglip(1, **NET), codes=12, code_features=4, fewer=0.5, nearest=3
)
IMAGES = np.random.default_rng(0).uniform(-1, 1, (4, 12, 12, 3)).astype(np.float32)
CLOSE = {"atol": 2e-5, "rtol": 0}


@functools.cache
def call():
    params = random_params(TINY, 0.3)
    run = lambda *arguments, method, **keywords: TINY.apply({"params": params}, *arguments, method=method, **keywords)  # noqa: E731
    return jax.jit(run, static_argnames="method")


def test_the_side_grows_with_the_codes_from_a_pixel_to_the_whole_image():
    assert TINY.ends == (1, 2, 4, 6, 8)
    assert TINY.resolutions == (1, 3, 7, 10, 12)  # 12 - 11 ((8 - t) / 7)^1.5
    assert TINY.drawn == (1, 1, 2, 3, 3)
    assert DetailFlow().ends == (*range(1, 9), *range(16, 129, 8))
    at = np.arange(4)  # the middle of the image, of all that is seen
    target = call()(IMAGES, at, method="lowered")
    np.testing.assert_allclose(target[0, :4, :4], np.broadcast_to(IMAGES[0].mean((0, 1)), (4, 4, 3)), **CLOSE)
    for side, image in zip((4, 4, 8, 12), target):
        assert not np.abs(image[side:]).any()
        assert not np.abs(image[:, side:]).any()
    last = jnp.full(4, 4)
    np.testing.assert_array_equal(call()(IMAGES, last, method="lowered"), IMAGES)
    np.testing.assert_array_equal(call()(IMAGES, last, method="enlarged"), IMAGES)
    flat = call()(jnp.full_like(IMAGES, 0.3), at, method="lowered")
    np.testing.assert_allclose(call()(flat, at, method="enlarged"), jnp.full_like(IMAGES, 0.3), **CLOSE)


def test_a_prefix_decodes_by_one_program_as_far_as_its_groups_are_whole():
    tokens, counts = call()(IMAGES, method="encode"), np.array([0, 1, 5, 8], np.int32)
    shown = call()(tokens, counts, method="prefix")
    whole = np.array([0, 1, 4, 8])
    other = jnp.where(np.arange(8)[None, :, None] < whole[:, None, None], tokens, (tokens + 1) % 12)
    np.testing.assert_allclose(call()(other, counts, method="prefix"), shown, **CLOSE)
    np.testing.assert_allclose(call()(tokens[2:3], np.int32(4), method="prefix"), shown[2:3], **CLOSE)
    np.testing.assert_array_equal(shown[0], 0)
    np.testing.assert_allclose(call()(tokens, method="decode")[3], shown[3], **CLOSE)
    frozen = lambda *arguments, method, key: call()(*arguments, key=key, method=method)  # noqa: E731
    seen = glimpse(TINY, frozen, tokens, jnp.arange(8) < counts[:, None], jax.random.split(jax.random.key(0), 4))
    np.testing.assert_allclose(seen, shown, **CLOSE)
    # what the decoder makes of few codes is what one of a smaller image would make
    painted = call()(call()(tokens, method="embed"), jnp.full(4, 2), method="painted")
    assert np.abs(painted[:, :8, :8]).max() > 0.1


def test_a_shorter_line_has_the_first_codes_and_decodes_as_their_prefix():
    short = TINY.clone(length=4)
    assert (short.spec.n, short.prefixes) == (4, (1, 2, 4))
    np.testing.assert_array_equal(short.spec.coords, grid(4, 2)[:4])
    tokens = call()(IMAGES, method="encode")
    shown = short.apply({"params": random_params(TINY, 0.3)}, tokens[:, :4], method="decode")
    np.testing.assert_allclose(shown, call()(tokens, np.int32(4), method="prefix"), **CLOSE)


def test_draws_leave_whole_groups_and_mistakes_lie_within_them():
    uniform = np.linspace(0, 1, 64, endpoint=False, dtype=np.float32)
    counts = np.asarray(call()(uniform, method="counts"))
    assert set(counts.tolist()) == {1, 2, 4, 6}  # 1 to 6, rounded up
    for count in (1, 2, 4, 8):
        begins = np.asarray(call()(uniform, np.full(64, count), method="begins"))
        want = {1: {8}, 2: {0, 1}, 4: {0, 1}, 8: {0, 1, 2, 4}}[count]
        assert set(begins.tolist()) == want


def test_after_a_mistake_the_encoder_goes_on_and_says_what_would_have_been_right():
    begin, neighbour = np.array([0, 1, 4, 8]), np.full((4, 8), 2, np.int32)
    latents, codes, again, tokens, _ = call()(IMAGES, begin, neighbour, method="mistake")
    clean, given, right = np.moveaxis(np.asarray(tokens), -1, 0)
    np.testing.assert_array_equal(clean, call()(IMAGES, method="encode")[..., 0])
    slot, end = np.arange(8), np.array([1, 2, 6, 10])[:, None]
    wrong = (slot >= begin[:, None]) & (slot < end)
    np.testing.assert_array_equal(given != right, wrong)  # the third nearest is not the nearest
    np.testing.assert_array_equal(right[slot < end], clean[slot < end])
    assert (right != clean)[:3].any(), "what follows depends on the mistake"
    np.testing.assert_allclose(again, call()(given[..., None], method="embed"), **CLOSE)
    np.testing.assert_allclose(codes, call()(clean[..., None], method="embed"), **CLOSE)
    _, _, plain = call()(latents[3:], method="quantise")
    _, _, _, _, alone = call()(IMAGES[3:], begin[3:], neighbour[3:], method="mistake")
    for name in ("codebook", "commit"):
        np.testing.assert_allclose(alone[name], plain[name], rtol=1e-5)
    pair = call()(IMAGES, key=jax.random.key(0), method="corrected")
    assert [x.shape for x in pair] == [(4, 8, 1)] * 2


def test_loss_falls_and_every_parameter_moves():
    module = TINY.clone(aligned=(6, 5))
    first = params = initial_params(module)
    grad_fn = tokenizer_gradients(module, Losses(lpips=0.0, adversarial=0.0))
    tx, batch = optax.adam(3e-3), {"image": ((IMAGES + 1) * 127.5).astype(np.uint8)}
    extra = {"age": jnp.zeros(12, jnp.int32), "frequency": jnp.zeros((1, 12))}

    @jax.jit
    def update(params, state, key):
        grads, _, metrics = grad_fn({"model": params}, extra, {}, batch, key, 0)

        def told(params):  # what a teacher's loss would move
            return module.apply({"params": params}, IMAGES, key=key, method="autoencode")[2]["features"].sum()

        grads = jax.tree.map(lambda a, b: a + 1e-3 * b, grads["model"], jax.grad(told)(params))
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, metrics

    state, losses = tx.init(params), []
    for i in range(30):
        params, state, metrics = update(params, state, jax.random.key(i % 3))
        losses.append(float(metrics["loss"]))
    assert not never_moved(first, params)
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])

    # what training compares is the target, twice
    made, own, seen = module.apply(
        {"params": params}, batch["image"] / 127.5 - 1, key=jax.random.key(0), method="autoencode"
    )
    assert made.shape == seen["target"].shape == (8, 12, 12, 3)
    _, _, metrics = update(params, state, jax.random.key(0))
    want = np.square(made - seen["target"]).mean()
    np.testing.assert_allclose(metrics["reconstruction"], want, rtol=1e-3)
    np.testing.assert_allclose(metrics["loss"], want + sum(own.values()), rtol=1e-3)


def test_codes_without_a_mistake_are_decoded_twice_with_their_gradient():
    params, count, none = random_params(TINY, 0.3), jnp.ones(4, jnp.int32), jnp.full(4, 8)

    @jax.jit
    def gradient(params, weight):
        def loss(params):
            recon, _, _ = TINY.apply(
                {"params": params}, IMAGES, count, none, jnp.zeros((4, 8), jnp.int32), method="trained"
            )
            return (recon * weight).sum(), recon

        return jax.grad(loss, has_aux=True)(params)

    halves = [gradient(params, np.repeat([1.0, 0.0][::sign], 4)[:, None, None, None]) for sign in (1, -1)]
    recon = np.asarray(halves[0][1])
    np.testing.assert_allclose(recon[:4], recon[4:], **CLOSE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), halves[0][0], halves[1][0])


# The generator --------------------------------------------------------------------------------------------------


def generator(spec, group=2):
    return Causal(Transformer(1, 16, 2, hidden=24), Label(16), inputs=Grouped(group=group)).complete(
        spec, Info(classes=3)
    )


def test_rows_carry_the_tokens_at_their_places_in_the_step_before():
    learned = [CONDITION - 1, CONDITION - 2]
    np.testing.assert_array_equal(carried((1, 1, 1, 3, 3)), [CONDITION, 0, 1, 2, *learned, 3, 4, 5])
    np.testing.assert_array_equal(carried((3, 3)), [CONDITION, *learned, 0, 1, 2])
    np.testing.assert_array_equal(carried((1,) * 4), [CONDITION, 0, 1, 2])
    spec = TokenSpec(grid(4, 3), codes=(5,))
    assert Groups(6, 3)(spec).sizes == (1,) * 6 + (3, 3)
    np.testing.assert_allclose(Gradual(2.5)(Groups(3, 3)(spec), spec), [2.5, 2.5, 2.5, 2.0, 1.5, 1.0])
    np.testing.assert_array_equal(Gradual()(Groups(3, 3)(spec), spec), 1)


def test_training_with_mistakes_predicts_what_makes_up_for_them():
    made, frozen = generator(TINY.spec), random_params(TINY, 0.3)
    params, order = random_params(made, 0.3), Groups(2, 2)
    batch, key = {"image": ((IMAGES + 1) * 127.5).astype(np.uint8), "label": np.arange(4) % 3}, jax.random.key(0)

    @functools.partial(jax.jit, static_argnames="share")
    def loss(share):
        return generator_loss(made, TINY, order, 0.0, train=False, mistaken=share)(params, frozen, batch, key, 0)[0]

    image = jnp.asarray(batch["image"] / 127.5 - 1, jnp.float32)
    which = jax.random.split(jax.random.fold_in(jax.random.split(key, 5)[3], 1))[1]
    given, target = call()(image, key=which, method="corrected")
    want, weight, _ = made.apply(
        {"params": params}, target, batch, order(TINY.spec), drop=jnp.zeros(4, bool), given=given, method="loss"
    )
    np.testing.assert_allclose(loss(1.0), (want * weight).mean(), rtol=1e-5)
    assert abs(loss(1.0) - loss(0.0)) > 1e-3


LINE = FlexTok(Patches((8, 8), 4), 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TINY.clone(single=3), r"tokenizer\.single, 3, must be whole groups"),
        (lambda: TINY.clone(size=(12, 16)), r"tokenizer\.size is \(12, 16\); it must be a square"),
        (lambda: TINY.clone(length=3), r"tokenizer\.length is 3; it must be one of 1, 2, 4, 6, 8, or 0"),
        (lambda: TINY.clone(aligned=(3,)), r"tokenizer\.aligned is \(3,\)"),
        (lambda: Groups(3, 4)(TINY.spec), r"of 8 tokens 5 are left for groups"),
        (lambda: Grouped(group=2).check(Order(np.arange(4)[None], (2, 1, 1))), r"steps that do not shrink"),
        (lambda: Grouped(group=2).check(Order(np.arange(4)[None], (1, 3))), r"of 2 slots at most"),
    ],
)
def test_senseless_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("tokenizer", "stage", "message"),
    [
        (LINE, {}, r"generator\.mistaken is 0\.3, but FlexTok does not say"),
        (TINY, {"tokens": "cache"}, r"a cache holds no mistakes"),
    ],
)
def test_mistakes_that_nobody_can_make_are_refused(tokenizer, stage, message):
    made = generator(tokenizer.spec)
    with pytest.raises(ValueError, match=message):
        generator_recipe(GeneratorStage(module=made, mistaken=0.3, **stage), made, tokenizer, {})
