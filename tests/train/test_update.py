"""The one update, the optimiser, and the gradients of tokenizer training."""

import functools
import math
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES

from ar_jax.config import Losses, TokenizerStage
from ar_jax.files.images import to_float
from ar_jax.machine.hlo import Program
from ar_jax.nets.patchgan import PatchGan
from ar_jax.tokenizers.quantize import Codebook, vector_quantise
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.tokens import TokenSpec, grid
from ar_jax.train.codes import renew
from ar_jax.train.optim import AdamW, Optim, make_optimiser, schedule
from ar_jax.train.recipes import generator_loss, gradients
from ar_jax.train.state import TrainState, create, make_update
from ar_jax.train.tokenizer import advice, tokenizer_gradients, tokenizer_recipe

CASE = CASES["llamagen_label"]


# the update


@functools.cache
def updated(accumulate, valid=None):
    """A generator after one step of plain gradient descent, without dropped conditions; `valid` weighs the images."""
    grad_fn = gradients(generator_loss(CASE.generator, VQGAN(), CASE.order, 0.0))  # tokens are given, not encoded
    tx = optax.sgd(1.0)
    state = create({"model": CASE.params}, {}, tx, 0.0)
    update = jax.jit(make_update(grad_fn, tx, accumulate=accumulate))
    batch = {"tokens": CASE.tokens, **CASE.batch} | ({"valid": np.array(valid)} if valid else {})
    return update(state, {}, batch, jax.random.key(0))


@pytest.mark.parametrize("valid", [None, (1.0,) * (CASE.images - 1) + (0.0,)])
def test_two_half_batches_give_the_update_of_the_whole_batch(valid):
    whole, parts = updated(1, valid), updated(2, valid)
    assert int(parts[0].step) == 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), whole[0].params, parts[0].params)
    np.testing.assert_allclose(whole[1]["loss"], parts[1]["loss"], rtol=1e-5)
    np.testing.assert_allclose(whole[1]["grad_norm"], parts[1]["grad_norm"], rtol=1e-4)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), CASE.params, whole[0].params["model"])
    assert max(jax.tree.leaves(moved)) > 1e-2, "the tolerance must be small against the update"


def test_an_update_passes_over_the_gradients_three_times():
    """For their norm and for two moments (two reads, two writes); the step reads moments and parameters, and writes these."""
    params = {"model": {"kernel": jnp.ones((300, 400))}}
    tx = make_optimiser(Optim(clip=1.0), 10, {"model": {"kernel": True}})
    given = lambda params, extra, frozen, batch, key, step: ({"model": batch}, extra, {"loss": jnp.zeros(())})  # noqa: E731
    state = create(params, {}, tx, 0.0)
    update = jax.jit(make_update(given, tx), donate_argnums=0)
    text = update.lower(state, {}, params["model"], jax.random.key(0)).compile().as_text()
    moved = sum(work.bytes for work in Program(text).work().values()) / params["model"]["kernel"].nbytes
    assert 10.9 < moved < 11.2


def test_parts_count_by_their_weights():
    def weighted(params, extra, frozen, batch, key, step):
        x, weight = batch["x"], batch["weight"]
        mean = (x * weight).sum() / jnp.maximum(weight.sum(), 1e-9)
        return {"model": {"kernel": mean}}, extra, {"loss": mean, "weight": weight.sum()}

    tx = optax.sgd(1.0)
    state = create({"model": {"kernel": jnp.zeros(())}}, {}, tx, 0.0)
    batch = {"x": jnp.array([1.0, 2.0, 3.0, 9.0]), "weight": jnp.array([1.0, 1.0, 1.0, 0.0])}
    for accumulate in (1, 2, 4):
        state_after, metrics = make_update(weighted, tx, accumulate=accumulate)(state, {}, batch, jax.random.key(0))
        assert float(metrics["loss"]) == -float(state_after.params["model"]["kernel"]) == 2.0
        assert "weight" not in metrics


def slope(params, extra, frozen, batch, key, step):
    """Gradients that are known: the mean of the batch."""
    return {"model": {"kernel": batch["x"].mean(0)}}, {"seen": extra["seen"] + 1}, {"loss": batch["x"].sum()}


def test_parts_of_a_batch_are_averaged_and_hand_their_extra_on():
    tx = optax.sgd(1.0)
    state = create({"model": {"kernel": jnp.zeros(2)}}, {"seen": jnp.int32(0)}, tx, 0.0)
    x = jnp.array([[1.0, 0.0], [2.0, 0.0], [3.0, 4.0], [6.0, 4.0]])
    state, metrics = make_update(slope, tx, accumulate=2)(state, {}, {"x": x}, jax.random.key(0))
    np.testing.assert_allclose(state.params["model"]["kernel"], [-3, -2])
    assert int(state.extra["seen"]) == 2
    np.testing.assert_allclose(metrics["loss"], 10)  # the mean of 8 and 12
    np.testing.assert_allclose(metrics["grad_norm"], math.sqrt(13), rtol=1e-6)


def test_the_average_follows_its_formula_from_the_initial_weights():
    tx, decay = optax.sgd(0.5), 0.9
    state = create({"model": {"kernel": jnp.array([1.0, 2.0])}}, {"seen": jnp.int32(0)}, tx, decay)
    update = jax.jit(make_update(slope, tx, ema=decay))
    weights = average = np.array([1.0, 2.0])
    np.testing.assert_array_equal(state.ema["kernel"], average)
    for i in range(4):
        x = np.array([[i + 1.0, -2.0 * i]])
        state, _ = update(state, {}, {"x": x}, jax.random.key(i))
        weights = weights - 0.5 * x[0]
        average = decay * average + (1 - decay) * weights
    np.testing.assert_allclose(state.params["model"]["kernel"], weights, rtol=1e-6)
    np.testing.assert_allclose(state.ema["kernel"], average, rtol=1e-6)


def test_no_average_is_kept_without_a_decay():
    tx = optax.sgd(1.0)
    assert create({"model": {"kernel": jnp.zeros(2)}}, {}, tx, 0.0).ema is None


# the optimiser


def adamw(params, gradients, optim, decays, steps):
    """AdamW with clipping in plain numpy, of one network; `gradients` is a list of trees over updates."""
    params = {name: np.array(x, np.float64) for name, x in params.items()}
    m = {name: np.zeros_like(x) for name, x in params.items()}
    v = {name: np.zeros_like(x) for name, x in params.items()}
    for t, grads in enumerate(gradients, 1):
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        for name in params:
            g = grads[name] * min(1.0, optim.clip / norm)
            m[name] = optim.rule.betas[0] * m[name] + (1 - optim.rule.betas[0]) * g
            v[name] = optim.rule.betas[1] * v[name] + (1 - optim.rule.betas[1]) * g**2
            step = (m[name] / (1 - optim.rule.betas[0] ** t)) / (
                np.sqrt(v[name] / (1 - optim.rule.betas[1] ** t)) + 1e-8
            )
            step += optim.weight_decay * params[name] * (name in decays)
            params[name] -= float(schedule(optim, steps)(t - 1)) * step
    return params


def test_every_network_is_clipped_by_its_own_norm_and_only_matrices_decay():
    random = np.random.default_rng(0)
    optim = Optim(lr=0.1, rule=AdamW((0.8, 0.9)), weight_decay=0.3, clip=1.0)
    shapes = {"kernel": (3, 2), "bias": (2,), "scale": (2,), "embedding": (4,), "uncond": (2,), "codebook": (3,)}
    params = {
        net: {k: random.normal(size=s).astype(np.float32) for k, s in shapes.items()}
        for net in ("model", "discriminator")
    }
    # the discriminator's gradients are large in the first update only: a joint norm would shrink the model's too
    scales = {"model": (0.1, 0.2, 5.0), "discriminator": (100.0, 0.1, 0.3)}
    grads = {
        net: [{k: np.float32(s * random.normal(size=n)) for k, n in shapes.items()} for s in scales[net]]
        for net in scales
    }

    decays = {name: name in {"kernel", "embedding", "codebook"} for name in shapes}
    tx = make_optimiser(optim, 10, {"model": decays, "discriminator": decays})
    state, now = tx.init(params), jax.tree.map(jnp.asarray, params)
    for i in range(3):
        updates, state = jax.jit(tx.update)({net: grads[net][i] for net in grads}, state, now)
        now = optax.apply_updates(now, updates)
    for net in params:
        expected = adamw(params[net], grads[net], optim, {"kernel", "embedding", "codebook"}, 10)
        for name in shapes:
            np.testing.assert_allclose(now[net][name], expected[name], rtol=1e-4, atol=1e-5, err_msg=f"{net} {name}")


def test_no_clip_leaves_large_gradients_as_they_are():
    tx = make_optimiser(Optim(lr=1.0, clip=0.0, weight_decay=0.0), 10, {"model": {"kernel": True}})
    params = {"model": {"kernel": jnp.zeros(2)}}
    state = tx.init(params)
    _, state = tx.update({"model": {"kernel": jnp.array([300.0, 400.0])}}, state, params)
    (moment,) = [x for path, x in jax.tree_util.tree_leaves_with_path(state) if ".mu" in jax.tree_util.keystr(path)]
    np.testing.assert_allclose(moment, [30, 40], rtol=1e-5)


def test_cosine_rises_to_the_peak_and_ends_at_its_end():
    lr = schedule(Optim(lr=2e-3, warmup=10, schedule="cosine", end_lr=1e-4), 110)
    np.testing.assert_allclose([lr(0), lr(5), lr(10)], [0, 1e-3, 2e-3], rtol=1e-5)
    np.testing.assert_allclose([lr(60), lr(110), lr(500)], [(2e-3 + 1e-4) / 2, 1e-4, 1e-4], rtol=1e-5)
    np.testing.assert_allclose(schedule(Optim(lr=2e-3, schedule="cosine"), 100)(0), 2e-3, rtol=1e-6)


def test_a_constant_rate_stays_after_its_warm_up():
    lr = schedule(Optim(lr=2e-3, warmup=4), 10)
    np.testing.assert_allclose([lr(0), lr(1), lr(4), lr(9), lr(10**6)], [0, 5e-4, 2e-3, 2e-3, 2e-3], rtol=1e-6)
    assert float(schedule(Optim(lr=2e-3), 10)(0)) == pytest.approx(2e-3)


@pytest.mark.parametrize("warmup", [100, 101])
def test_a_warm_up_longer_than_the_training_is_refused(warmup):
    with pytest.raises(ValueError, match=f"optim.warmup is {warmup}, but there are only 100 updates"):
        schedule(Optim(warmup=warmup, schedule="cosine"), 100)


# tokenizer training


class Pixels(nn.Module):
    """A decoder as small as may be."""

    @nn.compact
    def __call__(self, x):
        x = nn.silu(nn.Conv(4, (1, 1), name="first")(x)).repeat(4, axis=1).repeat(4, axis=2)
        return nn.Conv(3, (3, 3), name="last")(x)


class Tiny(nn.Module):
    """What `tokenizer_recipe` asks of a tokenizer, in three convolutions: quick to compile."""

    size: tuple = (16, 16)
    channels: int = 3
    rules: tuple = ()
    spec = TokenSpec(grid(4, 4), codes=(64,))
    codebooks = (Codebook("codebook"),)
    last_layer = "decoder/last/kernel"

    def setup(self):
        self.encoder, self.decoder = nn.Conv(3, (4, 4), 4), Pixels()
        self.codebook = self.param("codebook", nn.initializers.normal(0.5), (64, 3))

    def init_params(self, key):
        return self.init(key, jnp.zeros((1, *self.size, 3)), method="autoencode")["params"]

    def autoencode(self, image, key=None):
        latents = self.encoder(image)
        codes, index, losses = vector_quantise(latents, self.codebook)
        return self.decoder(codes), losses, {"latents": latents, "tokens": index.reshape(len(image), -1, 1)}


TOKENIZER = Tiny()
JUDGE = PatchGan(4, 1)
START = 3
LOSSES = Losses(lpips=0.0, adversarial=0.5, adversarial_start=START, adaptive=True, judge=JUDGE)
IMAGES = {"image": np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3)).astype(np.uint8)}


def stage(losses, **optim):
    settings = {"lr": 1e-2, "weight_decay": 0.0} | optim
    return TokenizerStage(module=TOKENIZER, steps=10, batch=4, losses=losses, optim=Optim(**settings))


@functools.cache
def adversarial_start():
    recipe = tokenizer_recipe(stage(LOSSES), TOKENIZER)
    return recipe, jax.jit(recipe.init)(jax.random.key(0))


@functools.cache
def adversarial_gradients():
    """The gradients of the recipe as a function of the number of finished updates."""
    _, state = adversarial_start()
    fn = jax.jit(tokenizer_gradients(TOKENIZER, LOSSES))
    return lambda step: fn(state.params, state.extra, {}, IMAGES, jax.random.key(0), jnp.int32(step))


@functools.cache
def explicit():
    """Losses and verdict written out, and their gradients by `jax.grad`."""
    _, state = adversarial_start()
    real = to_float(IMAGES["image"])

    def parts(model):
        recon, vq, _ = TOKENIZER.apply({"params": model}, real, method="autoencode")
        logits, _ = JUDGE.apply({"params": state.params["discriminator"]}, recon, state.extra["stats"], True)
        return jnp.square(recon - real).mean(), sum(vq.values()), -logits.mean()

    return jax.jit(lambda model: (parts(model), *(jax.grad(lambda m, i=i: parts(m)[i])(model) for i in range(3))))(
        state.params["model"]
    )


def test_adaptive_weight_is_the_ratio_of_the_gradients_at_the_last_convolution():
    _, _, metrics = adversarial_gradients()(START - 1)
    (_, _, verdict), pixels, _, blame = explicit()
    at = lambda grads: optax.tree.norm(grads["decoder"]["last"]["kernel"])  # noqa: E731
    ratio = at(pixels) / (at(blame) + 1e-4)
    np.testing.assert_allclose(metrics["adversarial_weight"], 0.5 * ratio, rtol=1e-4)
    np.testing.assert_allclose(metrics["adversarial"], verdict, rtol=1e-5)
    assert abs(float(ratio) - 1) > 0.01, "a constant 1 would pass too"


def test_gradients_of_the_tokenizer_are_those_of_the_written_out_loss():
    _, pixels, quantiser, blame = explicit()
    for step, weight in ((0, 0.0), (START - 1, float(adversarial_gradients()(START - 1)[2]["adversarial_weight"]))):
        grads, _, _ = adversarial_gradients()(step)
        expected = jax.tree.map(lambda a, b, c, weight=weight: a + b + weight * c, pixels, quantiser, blame)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), grads["model"], expected)


def test_the_verdict_counts_from_the_start_update_on():
    weights = [float(adversarial_gradients()(step)[2]["adversarial_weight"]) for step in range(START + 2)]
    assert weights[: START - 1] == [0.0] * (START - 1)
    assert all(weight > 0 for weight in weights[START - 1 :])


def test_the_discriminator_moves_from_the_start_update_on():
    recipe, state = adversarial_start()
    update, moved = jax.jit(recipe.update), []
    for i in range(START):
        before = state.params
        state, metrics = update(state, {}, IMAGES, jax.random.key(i))
        moved.append(
            {net: any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (before[net], state.params[net])))) for net in before}
        )  # fmt: skip
    assert [m["discriminator"] for m in moved] == [False] * (START - 1) + [True]
    assert all(m["model"] for m in moved)
    assert np.isfinite(list(map(float, metrics.values()))).all()
    assert not np.allclose(state.extra["stats"]["norm1"]["mean"], 0), "batch statistics are tracked all along"


def test_the_discriminator_learns_from_real_and_reconstructed_images():
    grads, _, _ = adversarial_gradients()(START - 1)
    _, state = adversarial_start()
    real = to_float(IMAGES["image"])
    recon, _, _ = TOKENIZER.apply({"params": state.params["model"]}, real, method="autoencode")

    def hinge(params):
        logits = [JUDGE.apply({"params": params}, x, state.extra["stats"], True)[0] for x in (real, recon)]
        return 0.5 * 0.5 * (jnp.maximum(0, 1 - logits[0]).mean() + jnp.maximum(0, 1 + logits[1]).mean())

    expected = jax.jit(jax.grad(hinge))(state.params["discriminator"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grads["discriminator"], expected)


def test_reset_replaces_exactly_the_dead_codes_by_latents_of_the_batch():
    random = np.random.default_rng(0)
    codebook, latents = random.normal(size=(6, 3)), random.normal(size=(6, 3))
    age = jnp.array([0, 5, 4, 9, 0, 5])
    extra = {"age": age, "latents": jnp.asarray(latents), "frequency": jnp.ones((1, 6)) / 6}
    state = TrainState(
        jnp.int32(9), {"model": {"codebook": jnp.asarray(codebook)}}, None, (), extra, jnp.int32(0), jnp.int32(0)
    )
    tokenizer = types.SimpleNamespace(spec=TokenSpec(grid(1, 1), codes=(6,)), codebooks=(Codebook("codebook"),))
    state = renew(state, jax.random.key(0), tokenizer, after=5)
    new = np.asarray(state.params["model"]["codebook"])
    np.testing.assert_array_equal(new[[0, 2, 4]], np.float32(codebook)[[0, 2, 4]])
    places = [np.flatnonzero((np.float32(latents) == row).all(-1)).tolist() for row in new[[1, 3, 5]]]
    assert all(len(place) == 1 for place in places)
    assert len({place[0] for place in places}) == 3, "two codes must not become the same latent"
    np.testing.assert_array_equal(state.extra["age"], [0, 0, 4, 0, 0, 0])


def test_training_with_reset_brings_unused_codes_to_latents():
    losses = Losses(lpips=0.0, adversarial=0.0, reset_after=1)
    recipe = tokenizer_recipe(stage(losses, lr=0.0), TOKENIZER)
    state = jax.jit(recipe.init)(jax.random.key(0))
    before, model = np.asarray(state.params["model"]["codebook"]), state.params["model"]
    _, _, seen = TOKENIZER.apply({"params": model}, to_float(IMAGES["image"]), method="autoencode")
    used = np.isin(np.arange(64), seen["tokens"])
    assert 0 < used.sum() < 64
    state, metrics = jax.jit(recipe.update)(state, {}, IMAGES, jax.random.key(0))
    after, latents = np.asarray(state.params["model"]["codebook"]), np.asarray(seen["latents"]).reshape(-1, 3)
    np.testing.assert_array_equal(after[used], before[used])
    apart = np.abs(after[~used][:, None] - latents).max(-1).min(-1)
    assert (apart < 1e-4).all()
    assert (np.abs(after - before)[~used].max(-1) > 1e-3).all()
    np.testing.assert_allclose(metrics["usage"], 1.0)  # new codes are young: they count as in use until a window passes


@pytest.mark.parametrize(("usage", "warns"), [(0.0, True), (0.0999, True), (0.1, False), (1.0, False)])
def test_advice_against_collapse_comes_below_a_tenth_of_the_codes(usage, warns):
    text = advice({"usage": usage})
    assert bool(text) == warns
    if warns:
        assert f"only {usage:.1%} of the codes are in use" in text
        assert "--tokenizer.losses.reset-after" in text
