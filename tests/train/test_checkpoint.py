import contextlib
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ar_jax.sharding import MeshShape, make_mesh, shard
from ar_jax.train.checkpoint import Checkpoints, latest_step, load_params, save_params
from ar_jax.train.state import create

WIDTH = 64
META = {"data": {"global_next_index": 12}}


def init(key, width=WIDTH, depth=3):
    """A state with everything in it: two networks, an average, an optimiser, integers and keyed extras."""
    keys = jax.random.split(key, depth + 1)
    model = {f"layer{i}": {"kernel": jax.random.normal(k, (width, 32))} for i, k in enumerate(keys[1:])}
    params = {"model": model | {"bias": jnp.arange(5.0)}, "discriminator": {"kernel": jax.random.normal(keys[0], (9,))}}
    return create(params, {"age": jnp.arange(7)}, optax.adam(1e-3), 0.9)


@jax.jit
def advance(state):
    """Moves every number of a state."""
    move = lambda x: x + jnp.ones((), x.dtype)  # noqa: E731
    return jax.tree.map(move, state)


def one_device():
    return make_mesh(MeshShape(data=1), jax.devices()[:1])


def shapes(**sizes):
    return jax.eval_shape(lambda key: init(key, **sizes), jax.random.key(0))


def restored(checkpoints, mesh=None, **sizes):
    like = shapes(**sizes)
    return checkpoints.restore(like, shard(like, mesh or one_device()))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@contextlib.contextmanager
def opened(folder, keep=2):
    checkpoints = Checkpoints(folder, keep)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


@pytest.fixture(scope="module")
def states():
    """States after 0, 1, 2... updates."""
    first = init(jax.random.key(0))
    second = advance(first)
    return [first, second, advance(second), advance(advance(second))]


@pytest.fixture(scope="module")
def saved(states, tmp_path_factory):
    """A folder of one checkpoint, to be read only."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with opened(folder) as checkpoints:
        checkpoints.save(states[1], META)
    return folder


def test_a_state_comes_back_bit_for_bit(states, saved):
    with opened(saved) as checkpoints:
        assert checkpoints.latest == 1
        state, meta = restored(checkpoints)
    assert_same(state, states[1])
    assert meta == META


def test_a_state_without_average_comes_back_without(states, tmp_path):
    plain = states[1].replace(ema=None)
    with opened(tmp_path) as checkpoints:
        save_and_wait(checkpoints, plain)
        like = shapes().replace(ema=None)
        state, meta = checkpoints.restore(like, shard(like, one_device()))
    assert_same(state, plain)
    assert meta == {}


def test_one_device_can_be_restored_onto_four(states, saved):
    mesh = make_mesh(MeshShape(data=1, fsdp=4), jax.devices()[:4])
    with opened(saved) as checkpoints:
        state, _ = restored(checkpoints, mesh)
    kernel = state.params["model"]["layer0"]["kernel"]
    assert len(kernel.sharding.device_set) == 4
    assert kernel.addressable_shards[0].data.shape == (WIDTH // 4, 32)
    assert_same(state, states[1])


def test_the_newest_checkpoints_are_kept(states, tmp_path):
    with opened(tmp_path, keep=2) as checkpoints:
        for state in states[1:]:
            checkpoints.save(state, {})
        checkpoints.wait()
        assert checkpoints.latest == 3
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdecimal()) == ["2", "3"]
    with opened(tmp_path) as checkpoints:
        assert_same(restored(checkpoints)[0], states[3])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": 48}, r"model: leaf layer0/kernel has shape \(64, 32\), but the configured model needs \(48, 32\)"),
        ({"depth": 4}, r"model: leaf layer3/kernel of shape \(64, 32\) is missing"),
        ({"depth": 2}, r"model: leaf layer2/kernel of shape \(64, 32\) is not part of the configured model"),
    ],
)
def test_the_first_leaf_of_another_model_is_named(saved, sizes, message):
    with opened(saved) as checkpoints, pytest.raises(ValueError, match=message):
        restored(checkpoints, **sizes)


def test_the_leaf_of_another_optimiser_is_named(saved):
    like = shapes()
    like = like.replace(opt=optax.sgd(0.1).init(like.params))
    with opened(saved) as checkpoints, pytest.raises(ValueError, match=r"training: leaf opt/0.* is not part of"):
        checkpoints.restore(like, shard(like, one_device()))


def test_an_average_the_checkpoint_lacks_is_named(states, tmp_path):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(states[1].replace(ema=None), {})
        checkpoints.wait()
        with pytest.raises(ValueError, match="1, ema: not in the checkpoint"):
            restored(checkpoints)


def test_samplers_read_the_model_or_its_average_alone(states, saved):
    like = shapes().params["model"]
    assert_same(load_params(saved / "1", like, "model"), states[1].params["model"])
    assert_same(load_params(saved / "1", like, "ema"), states[1].ema)
    with pytest.raises(ValueError, match=r"leaf layer0/kernel has shape \(64, 32\), .* needs \(8, 32\)"):
        load_params(saved / "1", shapes(width=8).params["model"], "model")


def test_parameters_alone_come_back_bit_for_bit(states, tmp_path):
    params = states[1].params["model"]
    save_params(tmp_path / "params", params)
    assert_same(load_params(tmp_path / "params", shapes().params["model"]), params)
    with pytest.raises(ValueError, match="params, state: leaf layer0/kernel has shape"):
        load_params(tmp_path / "params", shapes(width=8).params["model"])


@contextlib.contextmanager
def full_disk(allowed):
    """No file can grow beyond `allowed` bytes, for root too: writes then fail as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, hard))  # Python ignores the signal that comes with it
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_and_wait(checkpoints, state):
    checkpoints.save(state, {})
    checkpoints.wait()


@pytest.mark.parametrize("allowed", [0, 2000], ids=["nothing can be written", "the arrays cannot be written"])
def test_a_full_disk_is_reported_and_leaves_the_newest_checkpoint_as_it_was(states, tmp_path, allowed):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(states[1], META)
        checkpoints.wait()
        with full_disk(allowed), pytest.raises(ValueError, match="could not write a checkpoint") as caught:
            save_and_wait(checkpoints, states[2])
        assert "newest complete checkpoint is step 1" in str(caught.value)
        assert "Free some space" in str(caught.value)
        assert checkpoints.latest == 1
    with opened(tmp_path) as checkpoints:  # a new process
        assert checkpoints.latest == 1
        state, meta = restored(checkpoints)
        assert_same(state, states[1])
        assert meta == META
        checkpoints.save(states[3], META)  # once there is space
        checkpoints.wait()
        assert_same(restored(checkpoints)[0], states[3])


def test_a_full_disk_is_reported_by_close_too(states, tmp_path):
    def run():
        with opened(tmp_path) as checkpoints:
            checkpoints.save(states[1], {})

    with full_disk(2000), pytest.raises(ValueError, match="could not write a checkpoint"):
        run()
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest is None


def test_an_unfinished_checkpoint_is_never_selected(states, saved, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    for name in ("2.orbax-checkpoint-tmp", "8.orbax-checkpoint-tmp-1234567", "9.part"):
        shutil.copytree(saved / "1", folder / name)
    with opened(folder) as checkpoints:
        assert checkpoints.latest == 1
        assert_same(restored(checkpoints)[0], states[1])
        checkpoints.save(states[2], {})  # in the place of the first of them
        checkpoints.wait()
        assert_same(restored(checkpoints)[0], states[2])


def test_reading_leaves_the_unfinished_save_of_a_running_training_alone(saved, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    shutil.copytree(saved / "1", folder / "2.orbax-checkpoint-tmp")
    assert latest_step(folder) == 1
    assert (folder / "2.orbax-checkpoint-tmp").exists()
    assert latest_step(tmp_path / "absent") is None
