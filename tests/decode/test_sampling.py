"""Sampling as a value: what a model offers, how commands change it, and what earlier versions wrote."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tyro

from ar_jax.data import Info
from ar_jax.decode.guidance import Interval, Linear, Ramp
from ar_jax.decode.jacobi import Jacobi
from ar_jax.decode.logits import Filter
from ar_jax.decode.sampling import Sampling, adjustable, read_sampling
from ar_jax.decode.sequential import Sequential
from ar_jax.decode.temperature import Constant, KnownScales
from ar_jax.files import codec
from ar_jax.files.models import describe
from ar_jax.generators.block_flow import BlockFlow
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import Upsampled
from ar_jax.generators.masked import Masked
from ar_jax.heads.diffusion import Diffusion
from ar_jax.nets.adaln import AdaLN
from ar_jax.nets.conditioning import Label
from ar_jax.nets.gated import EncoderDecoder
from ar_jax.nets.transformer import Transformer
from ar_jax.nets.vit import ViT
from ar_jax.options import Sampler, described, options_of, read_numbers, show_numbers
from ar_jax.orders import Cells, Shuffled, raster, scales
from ar_jax.sampler import open_drawer
from ar_jax.tokenizers.patches import Patches
from ar_jax.tokenizers.pyramid import Pyramid
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.tokens import TokenSpec, grid

INFO = Info(classes=3)
CODES = VQGAN((8, 8), features=4, mult=(1, 2), res_blocks=0, latent=4, codes=16, code_features=4, groups=2)
PATCHES = Patches((8, 8), 4, channels=1, shift=(0.0,), scale=(1.0,))
PYRAMID = Pyramid((8, 8), features=4, mult=(1, 2), res_blocks=0, latent=4, codes=16, code_features=4, groups=2, scales=(1, 2, 4))
# a model of each kind, its order, and its settings as versions before this one wrote them
OLD = {
    "causal": (CODES, Causal(Transformer(1, 16, 2, hidden=24), Label(16)), raster, {"guidance": 2.5, "temperature": 0.9}),
    "masked": (
        PATCHES, Masked(ViT(1, 16, 2), ViT(1, 16, 2), Label(16), Diffusion(16, 1, steps="9"), buffer=2), Shuffled(2),
        {"guidance": 3.0, "guidance_rule": "linear"},
    ),
    "next_scale": (
        PYRAMID, Causal(AdaLN(1, 16, 2), Label(16), inputs=Upsampled(4, side=4)), scales,
        {
            "guidance": 2.0, "guidance_rule": "ramp", "guidance_last": -1, "guidance_reach": 9, "temperature": 1.0, "top_k": 9,
            "top_p": 0.95, "banned": [], "soft": False, "scales": [1, 4], "largest": 16, "known": [1, 2, 4], "refine": [],
            "anneal": "", "inner_steps": 0, "last_inner_steps": 0,
        },
    ),
    "cells": (
        PATCHES, BlockFlow(EncoderDecoder(1, 16, 2), Label(16), steps=9), Cells(1),
        {"guidance": 1.0, "guidance_rule": "ramp", "anneal": "linear", "inner_steps": 5, "last_inner_steps": 2},
    ),
}  # fmt: skip
READ = {
    "causal": Sampling(Interval(2.5), Constant(0.9)),
    "masked": Sampling(Linear(3.0)),
    "next_scale": Sampling(
        Ramp(2.0, 9, 16), KnownScales(1.0, 16, (1, 2, 4)), Filter(9, 0.95), fields=(("tokenizer.scales", (1, 4)),)
    ),
    "cells": Sampling(
        Ramp(1.0), fields=(("generator.anneal", "linear"), ("generator.steps", 5), ("generator.last_steps", 2))
    ),
}


def folder(path, name, settings=None):
    tokenizer, generator, order, old = OLD[name]
    generator = generator.complete(tokenizer.spec, INFO)
    describe(path / "tokenizer", "tokenizer", tokenizer, Info(), {})
    rest = {"tokenizer": "../tokenizer", "order": codec.encode(order), "sampling": old if settings is None else settings}
    describe(path / "generator", "generator", generator, INFO, rest)
    for kind, network in (("tokenizer", tokenizer), ("generator", generator)):  # a checkpoint is only looked for
        if jax.tree.leaves(jax.eval_shape(network.init_params, jax.random.key(0))):
            (path / kind / "params").mkdir()
    return str(path)


def parsed(arguments):
    own, arguments = options_of(arguments)
    return tyro.cli(Sampler, args=arguments[1:], default=own, config=(tyro.conf.AvoidSubcommands,))


def drawer(path, *arguments):
    return open_drawer(path, parsed([path, *arguments]))


@pytest.mark.parametrize("name", OLD)
def test_folders_of_earlier_versions_open_with_their_settings(tmp_path, name):
    path = folder(tmp_path, name)
    opened = open_drawer(path, Sampler())
    assert opened.sampling == READ[name] == drawer(path).sampling
    written = json.loads(json.dumps(codec.encode(opened.sampling)))
    assert read_sampling(written) == opened.sampling
    if name == "next_scale":
        assert opened.decoder.scales == (1, 4)
        assert opened.generator.spec.n == 17
    if name == "cells":
        assert (opened.generator.anneal, opened.generator.steps, opened.generator.last_steps) == ("linear", 5, 2)


def test_short_and_long_names_change_the_parts_and_the_fields_of_the_model(tmp_path):
    path = folder(tmp_path / "a", "causal")
    short = drawer(path, "--guidance", "3", "--top-k", "5", "--top_p=0.5", "--segments", "2", "--temperature", "0").sampling
    assert short == Sampling(Interval(3.0), Constant(0.0), Filter(5, 0.5), Sequential(2))
    assert drawer(path, "--guidance.weight", "3", "--guidance.last", "2").sampling.guidance == Interval(3.0, 2)
    path = folder(tmp_path / "b", "masked")
    changed = drawer(path, "--steps", "3", "--anneal", "linear", "--inner-steps", "7", "--last-inner-steps", "2")
    assert (changed.order.steps, changed.sampling.guidance) == (3, Linear(3.0))
    head = changed.generator.head
    assert (head.anneal, head.steps, head.last_steps, head.latest) == ("linear", "7", 2, 950)
    assert drawer(path, "--generator.head.steps", "ddim5").generator.head.steps == "ddim5"
    path = folder(tmp_path / "c", "next_scale")
    assert drawer(path, "--scales", "1,2x1,4").decoder.scales == (1, (2, 1), 4)
    with pytest.raises(ValueError, match=r"--tokenizer.scales is '1,b'; give numbers such as 1,2,3,5,8"):
        drawer(path, "--scales", "1,b")
    with pytest.raises(ValueError, match=r"--refine: this model has no generator.refine; it has .*guidance.reach"):
        drawer(path, "--refine", "1 1,3")


def test_the_help_of_a_model_lists_what_it_has_with_its_values_and_words(tmp_path, capsys):
    path = folder(tmp_path, "masked")
    with pytest.raises(SystemExit):
        parsed([path, "--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in ("--guidance.weight FLOAT", "(default: 3.0)", "--order.steps INT", "--generator.head.anneal", "(default: 9)"):
        assert words in said, words
    assert "denoising steps and their spacing" in said
    assert "--guidance.reach" not in said
    assert "--generator.head.width" not in said
    assert "FlexVAR" not in said


def test_a_file_may_choose_other_parts(tmp_path, monkeypatch):
    path, file = folder(tmp_path / "run", "causal"), tmp_path / "mine.py"
    file.write_text(
        "import dataclasses\nfrom ar_jax.decode.jacobi import Jacobi\n"
        "def get_sampling(own):\n    return dataclasses.replace(own, decoder=Jacobi(8))\n"
    )
    found = drawer(path, "--sampling", str(file), "--decoder.window", "4", "--guidance", "1.5").sampling
    assert found == Sampling(Interval(1.5), Constant(0.9), decoder=Jacobi(4))
    file.write_text("def get_sampling(own):\n    return 3\n")
    with pytest.raises(ValueError, match="must return an ar_jax Sampling, got 3"):
        drawer(path, "--sampling", str(file))
    with pytest.raises(ValueError, match="which is no Python file; published are configs/sampling/best_of\.py, configs/sampling/jacobi"):
        drawer(path, "--sampling", str(tmp_path / "no.py"))
    monkeypatch.chdir(tmp_path)  # published files are found from everywhere
    published = drawer(path, "--sampling", "configs/sampling/jacobi.py").sampling
    assert isinstance(published.decoder, Jacobi)
    assert published.guidance == Interval(2.5)


def test_only_what_a_model_calls_adjustable_can_be_changed():
    tokenizer, generator, order, _ = OLD["masked"]
    names = set(adjustable(generator=generator, tokenizer=tokenizer, order=order))
    assert names == {
        "order.steps", "order.scans", *(f"generator.head.{x}" for x in ("steps", "anneal", "last_steps", "latest", "sampler"))
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"generator\.head\.width cannot be changed in sampling; of this model these can: "):
        Sampling(fields=(("generator.head.width", 3),)).adapted(generator, tokenizer, order)
    with pytest.raises(ValueError, match=r"sampling\.guidance is 2\.0, which is no part of sampling; give one such as Interval"):
        Sampling(guidance=2.0)


def test_lists_of_numbers_as_words():
    for value, lists in (((1, 2, (4, 8)), False), (((1,), (1, 3), (1, 1, 2, 5)), True), (((2, 3), (4, 5)), False), ((), True)):
        if value != ((2, 3), (4, 5)):
            assert read_numbers(show_numbers(value), "x", lists) == value
    assert read_numbers("2x3,4x5", "x") == ((2, 3), (4, 5))
    assert described(Shuffled, "scans").startswith("programs that the steps may be compiled to")
    assert described(Diffusion, "last_steps").startswith("with a rule other than")


# Jacobi: the laws of SAME_TOKENS are in tests/test_laws.py ---------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("masked", "Jacobi needs a causal generator of codes that reveals one token a step; this Masked"),
        ("next_scale", r"this Causal reveals 16, of \(16,\) codes"),
    ],
)
def test_jacobi_refuses_what_it_cannot_draw(name, message):
    tokenizer, generator, order_fn, _ = OLD[name]
    generator = generator.complete(tokenizer.spec, INFO)
    order = order_fn(generator.spec, jax.random.split(jax.random.key(0), 1), 1, 0)
    sampling = Sampling(decoder=Jacobi(2))
    with pytest.raises(ValueError, match=message):
        sampling.tokens(generator, {}, {}, order, keys=jax.random.split(jax.random.key(0), 1))
    with pytest.raises(ValueError, match=r"decoder\.window is 0; it must be 1 or more"):
        Jacobi(0)


def test_the_account_of_one_step_after_the_other():
    tokenizer, generator, order_fn, _ = OLD["masked"]
    generator = generator.complete(tokenizer.spec, INFO)
    order = order_fn(generator.spec, jax.random.split(jax.random.key(0), 3), 3, 0)
    account = Sequential().account(generator, order, 3)
    assert {name: count.tolist() for name, count in account.calls.items()} == {"generator": [2] * 3, "head": [18] * 3}
    np.testing.assert_array_equal(account.accepted, [order.sizes] * 3)
    known = Sequential().account(generator, order, 3, done=order.sizes[0])
    assert known.calls["generator"].tolist() == [1] * 3
    assert dataclasses.replace(READ["causal"], soft=True).knobs(raster(CODES.spec), CODES.spec).soften[-1] == 1


def test_a_cache_of_many_steps_grows_in_four_parts_by_itself_and_draws_the_same_tokens():
    spec = TokenSpec(grid(8, 16), codes=(16,))  # 128 tokens
    generator = Causal(Transformer(1, 8, 2, hidden=12), Label(8)).complete(spec, INFO)
    params = generator.init_params(jax.random.key(0))
    order = raster(spec)
    batch, keys = {"label": np.arange(2)}, jax.random.split(jax.random.key(1), 2)

    def drawn(decoder):
        draw = jax.jit(lambda params: Sampling(decoder=decoder).tokens(generator, params, batch, order, keys=keys)[0])
        return str(jax.make_jaxpr(draw)(params)).count("length=32"), draw(params)

    (parts, tokens), (one, others) = drawn(Sequential()), drawn(Sequential(1))
    assert (parts, one) == (4, 0)
    np.testing.assert_array_equal(tokens, others)


def test_a_cache_grows_in_parts_where_it_pays():
    def parts(n, cached=True, decoder=Sequential()):
        return decoder.parts(raster(TokenSpec(grid(1, n), codes=(4,))), cached)

    assert (parts(256), parts(127), parts(256, cached=False)) == (4, 1, 1)
    assert (parts(256, decoder=Sequential(1)), parts(8, decoder=Sequential(3))) == (1, 3)
    assert Sequential().parts(scales(PYRAMID.spec), True) == 1
    with pytest.raises(ValueError, match=r"decoder\.segments is -1; it must be 1 or more, or 0 to choose"):
        Sequential(-1)
