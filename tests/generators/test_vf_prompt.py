"""VF prompt: the three prompts, none at all, codes of an image in two sizes, sampling and editing around a prompt."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import random_params

from ar_jax.data import Info
from ar_jax.decode.edit import Edit
from ar_jax.decode.guidance import Interval
from ar_jax.decode.sampling import Sampling
from ar_jax.decode.temperature import Constant
from ar_jax.generators.causal import Causal
from ar_jax.generators.vf_prompt import PromptCodes, Prompted, PromptRows
from ar_jax.nets.conditioning import Cond, Label
from ar_jax.nets.resize import resize
from ar_jax.nets.transformer import Transformer
from ar_jax.orders import Order, raster
from ar_jax.tokenizers.kl_vae import KLVAE
from ar_jax.tokenizers.two_sizes import TwoSizes
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.tokens import TokenSpec, grid, pyramid

BASE = VQGAN((4, 8), features=4, mult=(1, 2), res_blocks=1, latent=8, codes=12, code_features=4, groups=2)
SMALL = TwoSizes(BASE, (1, 2))  # 2 codes of 2x4 pixels before the 2x4 of 4x8
IMAGES = np.random.default_rng(0).uniform(-1, 1, (3, 4, 8, 3)).astype(np.float32)
NET, BATCH, KEYS = (
    Transformer(1, 16, 2, hidden=24),
    {"label": np.zeros(3, np.int32)},
    jax.random.split(jax.random.key(1), 3),
)
PROMPTS = ("codes", "random", "learned")


def prompted(prompt, spec=SMALL.spec, top_k=0):
    return Prompted(NET, Label(16), PromptCodes(prompt_top_k=top_k), prompt=prompt).complete(spec, Info(classes=3))


@functools.cache
def params_of(module):
    return random_params(module, 0.5, seed=2)


def drawn(generator, temperature=1.0, guidance=1.5):
    """Tokens and the account, from one compiled program."""
    value = Sampling(Interval(guidance), Constant(temperature))
    draw = jax.jit(lambda params: value.tokens(generator, params, BATCH, raster(generator.spec), keys=KEYS))
    return jax.tree.map(np.asarray, draw(params_of(generator)))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_without_a_prompt_it_is_the_base_model_bit_for_bit(prompt):
    """Initial parameters, loss and draw are the same programs."""
    spec = TwoSizes(BASE, 0).spec
    np.testing.assert_array_equal(spec.coords, BASE.spec.coords)
    tokens, drop, value = np.zeros((3, 8, 1), np.int32), np.zeros(3, bool), Sampling(Interval(2.0))

    def programs(generator):
        def loss(params, tokens, key):
            return generator.apply({"params": params}, tokens, BATCH, raster(spec), drop=drop, key=key, method="loss")

        def draw(params, keys):
            return value.tokens(generator, params, BATCH, raster(spec), keys=keys)

        key, params = jax.random.key(0), params_of(generator)
        return [str(jax.make_jaxpr(f)(*x)) for f, *x in (
            (generator.init_params, key), (loss, params, tokens, key), (draw, params, KEYS)
        )]  # fmt: skip

    plain = Causal(NET, Label(16)).complete(spec, Info(classes=3))
    for ours, theirs in zip(programs(prompted(prompt, spec, top_k=3)), programs(plain), strict=True):
        assert ours == theirs


@pytest.mark.parametrize("prompt", PROMPTS)
def test_what_follows_sees_the_prompt_if_it_says_anything_and_no_loss_is_on_one_that_does_not(prompt):
    generator, random = prompted(prompt), np.random.default_rng(1)
    tokens = random.integers(12, size=(3, 10, 1)).astype(np.int32)
    other = tokens.copy()
    other[:, 1] = (other[:, 1] + 1) % 12

    @jax.jit
    def run(tokens, key=None):
        return generator.apply(
            {"params": params_of(generator)}, tokens, BATCH, raster(generator.spec), drop=jnp.zeros(3, bool), key=key, method="loss"
        )  # fmt: skip

    (loss, weight, _), (moved, _, _) = run(tokens), run(other)
    # row 2 carries the last token of the prompt, so the losses of slots 2 and later may change
    assert (np.abs(loss - moved)[:, 2:].max() > 1e-3) == (prompt != "learned")
    np.testing.assert_array_equal(loss[:, 0], moved[:, 0])
    np.testing.assert_array_equal(weight, np.broadcast_to([float(prompt == "codes")] * 2 + [1.0] * 8, (3, 10)))
    if prompt == "random":  # drawn for every image and update, whatever the tokens have
        one, same, two = (run(x, jax.random.key(k))[0] for x, k in ((tokens, 0), (other, 0), (tokens, 1)))
        np.testing.assert_array_equal(one, same)
        assert (np.abs(one - two)[:, 2:].max(1) > 1e-3).all()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_is_drawn_first_by_the_same_program(prompt):
    generator = prompted(prompt, top_k=1)
    tokens, account = drawn(generator, temperature=0.0 if prompt == "random" else 1.0)
    assert (account.calls["generator"] == 10).all()
    first, rest = tokens[:, :2], tokens[:, 2:]
    alike = (first == first[0]).all()  # three images of one class
    # the likeliest code, a random one even where all others are the likeliest, and none
    assert alike == (prompt != "random")
    assert first.any() == (prompt != "learned")
    assert (rest != rest[0]).any()


def test_codes_of_two_sizes_and_their_training():
    params = params_of(SMALL)
    assert (SMALL.spec.scales, SMALL.spec.codes) == (((1, 2), (2, 4)), (12,))

    @jax.jit
    def run(params):
        ours, base = (functools.partial(module.apply, {"params": params}) for module in (SMALL, BASE))
        tokens = ours(IMAGES, method="encode")
        small = BASE.clone(size=(2, 4)).apply({"params": params}, resize(IMAGES, (2, 4), "area"), method="encode")
        return (
            tokens, jnp.concatenate([small, base(IMAGES, method="encode")], axis=1), ours(tokens, method="decode"),
            ours(IMAGES, method="autoencode"),
        )  # fmt: skip

    tokens, want, decoded, (recon, losses, seen) = run(params)
    np.testing.assert_array_equal(tokens, want)
    np.testing.assert_array_equal(seen["tokens"], tokens)
    assert seen["latents"].shape == (3, 10, 4)
    np.testing.assert_allclose(decoded, recon, atol=1e-4)
    assert losses.keys() == {"codebook", "commit"}
    assert len(np.unique(tokens)) > 6
    assert SMALL.codebooks == BASE.codebooks


def test_an_edit_draws_the_prompt_anew_unless_it_is_to_be_kept():
    generator, value = prompted("codes"), Sampling(Interval(1.0))
    free = np.zeros((3, 4, 8), bool)
    free[:2, 0, 0] = True

    @jax.jit
    def run(params, small):
        given = {"keys": KEYS, "decoded": False}
        draw = functools.partial(
            value.images, generator, SMALL, params, small, BATCH, raster(generator.spec), **given
        )  # fmt: skip
        image = SMALL.apply({"params": small}, IMAGES, method="encode")
        edit = Edit(jnp.asarray(IMAGES), jnp.asarray(free))
        return image, draw()[0], draw(edit=edit)[0], draw(edit=edit.replace(free=edit.free | True, scales=1))[0]

    image, anew, edited, kept = map(np.asarray, run(params_of(generator), params_of(SMALL)))
    np.testing.assert_array_equal(edited[2], image[2])  # where nothing is free
    np.testing.assert_array_equal(edited[:2, :2], anew[:2, :2])
    np.testing.assert_array_equal(edited[:2, 3:], image[:2, 3:])  # slot 2 is the free cell
    np.testing.assert_array_equal(kept[:, :2], image[:, :2])
    assert (kept[:, 2:] != image[:, 2:]).any(axis=(1, 2)).all()


def test_a_prompt_lies_in_the_middle_of_its_part_of_the_image():
    inputs = PromptRows(4, TokenSpec(pyramid(((1, 2), (2, 4))), codes=(3,)))
    params = {"embedding": np.zeros((3, 4), np.float32), "prompt": np.ones((3, 4), np.float32)}
    x, coords = inputs.apply(
        {"params": params}, np.zeros((1, 10, 1), np.int32), Cond(jnp.full((1, 1, 4), 2.0)), raster(inputs.spec), None, 0, 10
    )  # fmt: skip
    assert x[0, :, 0].tolist() == [2, 1, 1] + [0] * 7
    assert coords[0, :5].tolist() == [[-1, -1, -1], [0, 0.5, 0.5], [0, 0.5, 2.5], [1, 0, 0], [1, 0, 1]]


def test_bad_input_is_refused_in_a_sentence():
    with pytest.raises(
        ValueError, match=r"^tokenizer\.prompt is \(3, 2\); it must be 1 to \(2, 4\), as many as the image has, or 0"
    ):
        _ = TwoSizes(BASE, (3, 2)).spec
    with pytest.raises(ValueError, match=r"^tokenizer\.prompt is \(0, 2\)"):
        _ = TwoSizes(BASE, (0, 2)).spec
    with pytest.raises(ValueError, match=r"^tokenizer\.size must be multiples of 2 pixels, got \(5, 8\)"):
        _ = TwoSizes(BASE.clone(size=(5, 8)), 1).spec
    for base in (KLVAE(), SMALL):
        with pytest.raises(
            ValueError, match=r"^tokenizer\.base is \w+, but a small picture goes before tokens of one code in one"
        ):
            _ = TwoSizes(base, 1).spec
    with pytest.raises(ValueError, match=r"^generator\.prompt is 'words'; it must be codes, random or learned"):
        prompted("words")
    three = TokenSpec(pyramid((1, 2, 3)), codes=(4,))
    with pytest.raises(
        ValueError, match=r"^a prompt goes before one grid of one code a token, but the tokenizer has \(\(1, 1\), "
    ):
        prompted("codes", three)
    with pytest.raises(ValueError, match=r"of codes \(4, 4\)|Categorical needs tokens of one discrete code"):
        prompted("codes", TokenSpec(grid(1, 2), codes=(4, 4)))
    backwards, generator = Order(np.arange(10, dtype=np.int32)[None, ::-1], (1,) * 10), prompted("codes")
    trained = functools.partial(
        generator.apply, {"params": params_of(generator)}, np.zeros((3, 10, 1), np.int32), BATCH, backwards
    )
    sentence = r"^a prompt is drawn first, and all tokens in the order of their slots; use orders\.raster"
    with pytest.raises(ValueError, match=sentence):
        trained(drop=np.zeros(3, bool), method="loss")
    with pytest.raises(ValueError, match=sentence):
        PromptRows(8, SMALL.spec).check(backwards)
