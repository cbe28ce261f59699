"""Drawings in pieces: the images of sample.py, what is seen before they are ready, and what compiles."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import random_params

from ar_jax.data import Info
from ar_jax.decode.glimpse import cells, glimpse
from ar_jax.decode.guidance import Interval
from ar_jax.decode.jacobi import Jacobi
from ar_jax.decode.logits import Filter
from ar_jax.decode.sampling import Sampling
from ar_jax.demo.easel import Easel, Request, with_arrays
from ar_jax.files import codec
from ar_jax.files.models import describe
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import NextScale
from ar_jax.generators.masked import Masked
from ar_jax.generators.maskgit import MaskGIT
from ar_jax.heads.categorical import Categorical
from ar_jax.machine.sharding import make_mesh
from ar_jax.nets.adaln import AdaLN
from ar_jax.nets.conditioning import Label
from ar_jax.nets.transformer import Transformer
from ar_jax.nets.vit import GPT, ViT
from ar_jax.options import Sampler, replaced
from ar_jax.orders import Confident, Shuffled, raster, scales
from ar_jax.sampler import Given, condition_table, open_drawer
from ar_jax.tokenizers.latent_pyramid import LatentPyramid
from ar_jax.tokenizers.patches import Patches
from ar_jax.tokenizers.pyramid import Pyramid
from ar_jax.tokenizers.residual_pyramid import ResidualPyramid
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.train.checkpoint import save_params

INFO = Info(classes=10, class_names=("ant", "bee", "cat", *"3456789"))
NET = {"features": 4, "mult": (1, 2), "res_blocks": 0, "codes": 16, "code_features": 4, "groups": 2}
GRID = VQGAN((8, 8), latent=4, **NET)
RESIDUAL = ResidualPyramid((8, 8), scales=(2, 4), **NET)
HEAD = Categorical(std=0.5)
MODELS = {  # tokenizer, generator, order
    "causal": (GRID, Causal(Transformer(1, 16, 2, hidden=24), Label(16), HEAD), raster),
    "scales": (
        RESIDUAL,
        Causal(AdaLN(1, 16, 2, hidden=24, gate=0.5), Label(16), Categorical(bias=True, std=0.5), NextScale(channels=4)),
        scales,
    ),
    "masked": (
        GRID, Masked(ViT(1, 16, 2, hidden=24), ViT(1, 16, 2, hidden=24), Label(16), HEAD, buffer=2), Shuffled(5, 2),
    ),
    "maskgit": (GRID, MaskGIT(GPT(1, 16, 2, hidden=24, rows=0), Label(16), HEAD), Confident(5)),
}  # fmt: skip


def described(place, name, asked=Label(16), info=INFO):
    """A run folder with random weights."""
    tokenizer, generator, order = MODELS[name]
    generator = generator.clone(conditioning=asked).complete(tokenizer.spec, info)
    settings = {
        "tokenizer": "../tokenizer",
        "order": codec.encode(order),
        "sampling": codec.encode(Sampling(Interval(1.5))),
    }
    for kind, network, seen, rest in (("tokenizer", tokenizer, Info(), {}), ("generator", generator, info, settings)):
        describe(place / kind, kind, network, seen, rest)
        save_params(place / kind / "params", random_params(network, 0.3))
    return place


@pytest.fixture(scope="module", params=MODELS)
def easel(request, tmp_path_factory):
    return Easel(str(described(tmp_path_factory.mktemp(request.param) / "run", request.param)), Sampler())


def drawn(easel, **wish):
    """All stages of a drawing."""
    return list(
        easel.draw(Request(**{"sampling": easel.drawer.sampling, "labels": ("bee", "2"), "count": 3, "seed": 3} | wish))
    )


def commanded(easel, sampling, count, seed, given=None):
    """What sample.py draws."""
    drawer = open_drawer(
        str(easel.drawer.model.folder),
        Sampler(batch=count, seed=seed, sampling=sampling, tokenizer=str(easel.drawer.tokenizer.folder)),
    )
    _, table = condition_table(INFO, drawer.options, ("bee", "2"))
    batch = {name: rows[np.arange(count) % 2] for name, rows in table.items()}
    return np.stack(
        [one.image for one in drawer.compile(make_mesh(devices=jax.devices()[:1]), given)(batch, np.arange(count))]
    )


def close(images, want):
    """Equal up to a grey level of rounding."""
    assert images.shape == want.shape
    assert np.abs(images.astype(int) - want).max() <= 1


def test_pictures_while_they_are_made_end_in_those_of_the_command(easel):
    sizes = sizes_of(easel)
    steps, stages = len(sizes), drawn(easel)
    assert stages[-1].done
    assert not any(stage.done for stage in stages[:-1])
    assert stages[-1].names == ("bee", "cat", "bee")
    assert f"calls an image: {steps} of the generator; " in stages[-1].note
    assert "compiled in" in stages[-1].note
    close(stages[-1].images, commanded(easel, easel.drawer.sampling, 3, 3))
    seen = [stage for stage in stages[:-1] if stage.images is not None]
    assert [stage.note for stage in seen] == [f"step {i} of {steps}" for i in range(1, steps)]
    assert all("compiling program" in stage.note for stage in stages[:-1] if stage.images is None)
    if len(easel.drawer.decoder.spec.scales) > 1:
        return
    grey = [(stage.images == 128).all(-1).reshape(3, 4, 2, 4, 2).all((2, 4)) for stage in seen]
    for cell, known in zip(grey, np.cumsum(sizes)):
        assert (~cell).sum() == 3 * known, "what is not known is grey"
    assert all((later <= earlier).all() for earlier, later in itertools.pairwise(grey)), "what is seen stays"


def sizes_of(easel):
    spec, keys = easel.drawer.generator.spec, jax.random.split(jax.random.key(0), 1)
    return jax.eval_shape(lambda: easel.drawer.order(spec, keys, 1, 0)).sizes


@pytest.mark.parametrize("easel", ["causal", "scales"], indirect=True)
def test_numbers_compile_nothing(easel):
    own, pictures, compilations = easel.drawer.sampling, [drawn(easel)[-1].images], []
    changes = (
        ("guidance.weight", 1.0), ("guidance.weight", 4.0), ("guidance.last", 1), ("temperature.value", 0.0),
        ("temperature.value", 0.3), ("filter.top_k", 3), ("filter.top_p", 0.4),
    )  # fmt: skip
    wishes = [{"sampling": replaced(own, path, value)} for path, value in changes]
    wishes += [{"seed": 2**40}, {"labels": ("9",)}, {"count": 4}]
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compilations.append(name) if "backend_compile" in name else None
    )
    try:
        for wish in wishes:
            stages = drawn(easel, **wish)
            assert all(stage.images is not None for stage in stages)
            pictures.append(stages[-1].images)
    finally:
        jax.monitoring.clear_event_listeners()
    assert not compilations
    assert len({picture.tobytes() for picture in pictures}) >= 5, "and they change the pictures"
    close(pictures[6], commanded(easel, wishes[5]["sampling"], 3, 3))
    np.testing.assert_array_equal(pictures[-1][:3], pictures[0])


@pytest.mark.parametrize("easel", ["scales", "maskgit"], indirect=True)
def test_holes_are_filled_as_by_the_command(easel):
    image = np.random.default_rng(0).integers(256, size=(8, 8, 3)).astype(np.uint8)
    upper, lower = np.zeros((2, 8, 8), bool)
    upper[:4, 2:6] = lower[4:, 2:6] = True
    end = drawn(easel, given=Given(image, upper))[-1]
    np.testing.assert_array_equal(end.images[:, ~upper], np.broadcast_to(image[~upper], (3, 48, 3)))
    close(end.images, commanded(easel, easel.drawer.sampling, 3, 3, Given(image, upper)))
    before = easel.compiled
    if not easel.drawer.generator.any_order:
        other = drawn(easel, given=Given(image, lower))[-1].images
        np.testing.assert_array_equal(other[:, ~lower], np.broadcast_to(image[~lower], (3, 48, 3)))
        assert easel.compiled == before, "another hole compiles nothing, unless it makes another order"
    with pytest.raises(ValueError, match="nothing is left to draw"):
        drawn(easel, given=Given(image, np.zeros((8, 8), bool)))


@pytest.mark.parametrize("easel", ["causal"], indirect=True)
def test_another_decoder_and_another_layout_draw_the_same_in_other_calls(easel):
    own = easel.drawer.sampling
    want, (*_, end) = drawn(easel)[-1], drawn(easel, sampling=dataclasses.replace(own, decoder=Jacobi(8)))
    np.testing.assert_array_equal(end.images, want.images)
    assert float(end.note.split()[3]) < 16
    for message, wish in (
        ("count is 65", {"count": 65}),
        ("seed is -1", {"seed": -1}),
        ("no class", {"labels": ("dog",)}),
    ):
        with pytest.raises(ValueError, match=message):
            drawn(easel, **wish)
    assert drawn(easel, count=1)[-1].images.shape == (1, 8, 8, 3), "the easel is free again"


@pytest.mark.parametrize(
    "tokenizer",
    [
        ResidualPyramid((8, 8), scales=(1, 2, 4), **NET),
        Pyramid((8, 8), scales=(1, 2, 4), latent=4, **NET),
        LatentPyramid(Patches((8, 8), patch=2), scales=(1, 2, 4)),
    ],
    ids=lambda tokenizer: type(tokenizer).__name__,
)
def test_scales_are_seen_one_by_one(tokenizer):
    params, spec = jax.jit(tokenizer.init_params)(jax.random.key(0)), tokenizer.spec
    random = np.random.default_rng(1)
    if spec.codes:
        tokens, other = (random.integers(16, size=(2, spec.n, 1)).astype(np.int32) for _ in range(2))
    else:
        tokens, other = (random.normal(size=(2, spec.n, spec.channels)).astype(np.float32) for _ in range(2))
    frozen = functools.partial(tokenizer.apply, {"params": params})
    see = jax.jit(lambda tokens, known: glimpse(tokenizer, frozen, tokens, known))
    level, every = spec.coords[:, 0], np.ones((2, spec.n), bool)
    np.testing.assert_allclose(see(tokens, every), frozen(tokens, method="decode"), atol=1e-5)
    shown = [
        np.asarray(see(np.where((level < count)[:, None], tokens, other), every & (level < count)))
        for count in range(4)
    ]
    assert (shown[0] == 0).all(), "nothing is known yet"
    assert len({picture.tobytes() for picture in shown}) == 4
    np.testing.assert_array_equal(shown[2], see(tokens, every & (level < 2)), "later tokens may be anything")
    partly = every & ((level < 2) | (np.arange(spec.n) == spec.n - 1))
    np.testing.assert_array_equal(see(tokens, partly), shown[2], "a part of a scale is not seen")


def test_cells_of_slots():
    slots = np.zeros((1, 16), bool)
    slots[0, [0, 7]] = True
    want = np.zeros((8, 12), bool)
    want[:2, :3] = want[2:4, 9:] = True
    np.testing.assert_array_equal(cells(GRID.spec, jnp.asarray(slots), (8, 12))[0], want)


def test_filters_take_arrays_as_they_take_numbers():
    logits = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    turned = jax.jit(lambda k, p: with_arrays(Filter(), {"top_k": k, "top_p": p})(logits))
    for k, p in ((0, 1.0), (3, 1.0), (0, 0.5), (4, 0.7), (99, 1.0)):
        np.testing.assert_array_equal(turned(np.int32(k), np.float32(p)), Filter(k, p)(logits))
