"""GigaTok: tokens on a line, what a teacher looks at, the gradient that is turned."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import initial_params, never_moved, random_params

from ar_jax.convert.sources import param_shapes
from ar_jax.decode.guidance import Staged
from ar_jax.machine.sharding import MeshShape, make_mesh, shard
from ar_jax.nets.queries import QFormer
from ar_jax.orders import raster
from ar_jax.tokenizers.gigatok import GigaTok, pooled
from ar_jax.tokenizers.quantize import rotated
from ar_jax.tokens import TokenSpec, grid
from ar_jax.train.losses import Teacher
from ar_jax.train.tokenizer import training_pass

SMALL = GigaTok(
    size=(8, 16), tokens=4, features=4, mult=(1, 2), res_blocks=1, latent=8, encoder_net=QFormer(1, 8, 2),
    decoder_net=QFormer(2, 8, 2, tap=1), target=5, codes=12, code_features=4, groups=2,
)  # fmt: skip
IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 8, 16, 3)).astype(np.float32)


@functools.cache
def made():
    """Random parameters, and what a training pass with a teacher makes of the images."""
    params = random_params(SMALL, 0.3)
    run = jax.jit(lambda params: training_pass(SMALL, params, IMAGES, None, frozenset({"image", "to_map/told"})))
    return params, *run(params)


def test_codes_decode_as_in_training_and_a_teacher_sees_a_map():
    params, made_of, losses, seen = made()
    apply = functools.partial(SMALL.apply, {"params": params})
    assert SMALL.spec.n == 4
    assert seen["tokens"].shape == (2, 4, 1)
    assert losses.keys() == {"codebook", "commit"}
    np.testing.assert_array_equal(apply(IMAGES, method="encode"), seen["tokens"])
    np.testing.assert_allclose(apply(seen["tokens"], method="decode"), made_of["image"], atol=1e-4)
    told = made_of["to_map/told"]
    assert told.shape == (2, 4, 8, 5)
    teacher = Teacher(1.0, "to_map/told", lambda params, image: jnp.ones((2, 8, 16, 5)), projected=False)
    assert -1 < 1 - teacher({}, {}, IMAGES, told) < 1


def test_loss_falls_and_every_parameter_moves():
    module, tx = SMALL.clone(shortcut=1, rotation=True), optax.adam(1e-2)
    first = params = initial_params(module)

    def loss_fn(params):
        made, own, _ = training_pass(module, params, IMAGES, None, frozenset({"image", "to_map/told"}))
        return (
            jnp.square(made["image"] - IMAGES).mean() + sum(own.values()) + jnp.square(made["to_map/told"] - 1).mean()
        )

    @jax.jit
    def update(params, state):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for _ in range(20):
        params, state, loss = update(params, state)
        losses.append(float(loss))
    # the bias of keys moves no softmax
    assert all(name.endswith("['key']['bias']") for name in never_moved(first, params))
    assert losses[-1] < 0.7 * losses[0]


def test_means_over_ever_smaller_cells_begin_with_the_whole_twice():
    x = np.random.default_rng(1).normal(size=(1, 4, 4, 2)).astype(np.float32)
    found = np.asarray(pooled(x, 8))[0]
    halves = [x[0, :, :2], x[0, :, 2:]]
    quarters = [x[0, i : i + 2, j : j + 2] for i in (0, 2) for j in (0, 2)]
    np.testing.assert_allclose(found, [y.mean((0, 1)) for y in (x[0], x[0], *halves, *quarters)], atol=1e-6)


def test_a_turned_gradient_has_the_code_in_front_and_keeps_angles():
    z, code, readout = np.random.default_rng(2).normal(size=(3, 5, 4)).astype(np.float32)
    np.testing.assert_allclose(rotated(z, code), code, atol=1e-4)
    grad = jax.grad(lambda z: (rotated(z, code) * readout).sum())(z)
    length = lambda x: np.linalg.norm(x, axis=-1)  # noqa: E731
    ratio = length(code) / length(z)
    np.testing.assert_allclose(length(grad), ratio * length(readout), rtol=1e-4)
    # what the gradient says along z is what the readout says along the code
    np.testing.assert_allclose((grad * z).sum(-1), (readout * code).sum(-1), atol=1e-4)


def test_guidance_is_full_at_first_and_off_until_its_start():
    spec = TokenSpec(grid(1, 11), codes=(2,))
    weight = Staged(2.5)(raster(spec), spec)
    np.testing.assert_allclose(weight, [2.5, 1.0001, *[2.5] * 9])
    assert (Staged(1.0)(raster(spec), spec) == 1).all()
    np.testing.assert_allclose(Staged(3.0, "reversed").at(np.array([0.0, 0.5, 1.0])), [3.0001, 2.0001, 1.0001])


def test_every_rule_of_tensor_parallelism_divides_something():
    mesh = make_mesh(MeshShape(1, 1, 2), jax.devices()[:2])
    divided = jax.tree.leaves(shard(param_shapes(SMALL), mesh, SMALL.rules))
    assert any(not where.is_fully_replicated for where in divided)


def test_bad_input_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match=r"^tokenizer\.tokens is 6; it must be a power of two"):
        param_shapes(SMALL.clone(tokens=6))
    with pytest.raises(ValueError, match=r"^tokenizer\.size must be multiples of 2 pixels, got \(9, 8\)"):
        _ = SMALL.clone(size=(9, 8)).spec
    with pytest.raises(ValueError, match=r"^tokenizer\.size is \(2, 2\), of which the convolutions make a single cell"):
        param_shapes(SMALL.clone(size=(2, 2)))
    with pytest.raises(ValueError, match=r"^tokenizer\.decoder_mult is \(1,\); it must have 2 levels"):
        param_shapes(SMALL.clone(decoder_mult=(1,)))
    with pytest.raises(ValueError, match=r"^tokenizer\.target is 5, but decoder_net\.tap is 0; give the layer"):
        param_shapes(SMALL.clone(decoder_net=QFormer(2, 8, 2)))
    with pytest.raises(ValueError, match=r"^QFormer: tap is 3, but there are 2 layers; give one of them, or 0"):
        param_shapes(SMALL.clone(decoder_net=QFormer(2, 8, 2, tap=3)))
    with pytest.raises(ValueError, match=r"^guidance\.plan is 'steps'; it must be one of step, linear, reversed,"):
        Staged(2.0, "steps")
