import contextlib
import os
import re
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from ar_jax.machine.sharding import MeshShape, make_mesh, shard
from ar_jax.train import checkpoint
from ar_jax.train.checkpoint import Checkpoints, damage, find_step, latest_step, load_matching, load_params, save_params
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


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


CHANGES = {
    "flipped": flipped, "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path)),
    "sparse": lambda path: os.truncate(path, 2**40), "missing": os.unlink,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_parameters_that_are_not_what_was_saved_are_refused(tmp_path, change):
    params, whole = {"kernel": np.arange(32, dtype=np.float32)}, tmp_path / "whole"
    like = jax.eval_shape(lambda: params)
    save_params(whole, params)
    files = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file() and path.stat().st_size]
    assert len(files) > 4
    for file in files:
        place = tmp_path / "changed" / "params"
        shutil.copytree(whole, place)
        CHANGES[change](place / file)
        if change == "missing" and file.name == checkpoint.CONTENTS:  # as a folder of an earlier version
            assert_same(load_params(place, like), params)
        else:
            with pytest.raises(ValueError, match=r"changed/params.* (get .*again|get it again)$") as caught:
                load_params(place, like)
            assert "\n" not in str(caught.value)
        shutil.rmtree(place)


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


# damage


def damaged(folder, kind, name=None):
    """Damages a file of a checkpoint, or its largest one."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    file = folder / name if name else max(files, key=lambda path: path.stat().st_size)
    size = file.stat().st_size
    if kind == "missing":
        file.unlink()
    elif kind == "other":
        content = bytearray(file.read_bytes())
        content[size // 2] ^= 255
        file.write_bytes(content)
    else:
        os.truncate(file, {"empty": 0, "half": size // 2, "last byte": size - 1}[kind])


@pytest.fixture
def two(states, saved_twice, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved_twice, folder)
    return folder


@pytest.fixture(scope="module")
def saved_twice(states, tmp_path_factory):
    folder = tmp_path_factory.mktemp("twice") / "checkpoints"
    with opened(folder) as checkpoints:
        checkpoints.save(states[1], META)
        checkpoints.save(states[2], {"data": {"global_next_index": 24}})
    return folder


PARTS = ("contents.json", "model/_METADATA", "ema/manifest.ocdbt", "training/_sharding", None)


@pytest.mark.parametrize("name", PARTS, ids=lambda name: name or "arrays")
@pytest.mark.parametrize("kind", ["missing", "empty", "half", "last byte", "other"])
def test_a_damaged_checkpoint_is_passed_over_set_aside_and_can_be_saved_again(states, two, capsys, kind, name):
    damaged(two / "2", kind, name)
    before = {path: path.stat().st_mtime_ns for path in two.rglob("*")}
    assert latest_step(two) == 1
    assert before == {path: path.stat().st_mtime_ns for path in two.rglob("*")}, "looking changes nothing"
    assert f"checkpoint {two / '2'} is broken (" in capsys.readouterr().out
    with opened(two) as checkpoints:
        said = capsys.readouterr().out
        assert f"checkpoint {two / '2'} is broken (" in said
        assert "kept as 2.broken" in said
        assert checkpoints.latest == 1
        state, meta = restored(checkpoints)
        assert_same(state, states[1])
        assert meta == META
        checkpoints.save(states[2], {})
    assert sorted(path.name for path in two.iterdir()) == ["1", "2", "2.broken"]
    assert latest_step(two) == 2


def test_every_process_goes_on_from_the_step_that_the_first_one_sees(states, two, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_index", lambda: 1)  # which sees both
        patch.setattr(checkpoint, "barrier", lambda name: None)
        patch.setattr(checkpoint, "agreed", lambda value: np.ones_like(value))
        damaged(two / "2", "missing", None)
        with opened(two) as checkpoints:
            assert checkpoints.latest == 1
            assert_same(restored(checkpoints)[0], states[1])
    assert sorted(path.name for path in two.iterdir()) == ["1", "2"], "only the first process sets anything aside"


def test_damage_is_named(two):
    changes = {"other": " has other content", "half": r" has \d+ bytes, not \d+", "missing": " is missing"}
    for kind, words in changes.items():
        damaged(two / "1", kind, "model/_METADATA")
        assert re.fullmatch("model/_METADATA" + words, damage(two / "1"))
    assert damage(two / "2") == ""
    assert damage(two / "3") == "its contents.json is missing, as in earlier versions, or damaged"


def test_a_checkpoint_that_breaks_twice_is_set_aside_twice(states, two):
    for _ in range(2):
        damaged(two / "2", "half")
        with opened(two) as checkpoints:
            checkpoints.save(states[2], {})
    assert sorted(path.name for path in two.iterdir()) == ["1", "2", "2.broken", "2.broken-2"]


def test_where_no_checkpoint_is_whole_nothing_is_begun_anew(two):
    damaged(two / "1", "half")
    shutil.rmtree(two / "2")
    (two / "2").mkdir()
    assert latest_step(two) is None
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole; the newest, 2, is broken \(its contents.json"):
        Checkpoints(two)
    assert sorted(path.name for path in two.iterdir()) == ["1", "2"]


def test_an_older_checkpoint_half_deleted_is_left_to_the_next_clean_up(states, two):
    shutil.rmtree(two / "1" / "model")
    with opened(two) as checkpoints:
        assert checkpoints.latest == 2
        checkpoints.save(states[3], {})
    assert sorted(path.name for path in two.iterdir()) == ["2", "3"]


def test_another_model_is_refused_and_not_gone_back_from(two):
    with opened(two) as checkpoints, pytest.raises(ValueError, match="2, model: leaf layer0/kernel has shape"):
        restored(checkpoints, width=48)
    assert sorted(path.name for path in two.iterdir()) == ["1", "2"]


def test_arrays_too_large_to_be_summed_that_cannot_be_read_stop_with_advice(two, monkeypatch):
    monkeypatch.setattr(checkpoint, "SUMMED", 2**12)
    with opened(two) as checkpoints:
        checkpoints.save(advance(advance(advance(init(jax.random.key(0))))), META)
    (large,) = [path for path in (two / "3" / "model").rglob("*") if path.is_file() and path.stat().st_size > 2**12]
    content = large.read_bytes()
    large.write_bytes(bytes(len(content)))
    assert latest_step(two) == 3, "sizes are right"
    with opened(two) as checkpoints, pytest.raises(ValueError, match=r"cannot be read: .* rename it to 3.broken"):
        restored(checkpoints)


# which are kept, and which is found


def kept(folder):
    return sorted(int(path.name) for path in folder.iterdir())


def saved_with(folder, figures, **policy):
    """Checkpoints of steps 1, 2... with these held-out figures."""
    state = init(jax.random.key(0))
    checkpoints = Checkpoints(folder, **policy)
    try:
        for found in figures:
            state = advance(state)
            checkpoints.save(state, {}, found)
    finally:
        checkpoints.close()


def test_multiples_and_the_best_are_kept_beside_the_newest(tmp_path):
    loss = [{"loss": x} for x in (3.0, 1.0, 2.0, 2.5, 9.0, 8.0, 7.0)]
    saved_with(tmp_path, loss, keep=1, keep_every=4, keep_best=2)
    assert kept(tmp_path) == [2, 3, 4, 7]
    assert find_step(tmp_path, "best") == 2
    assert find_step(tmp_path) == find_step(tmp_path, "newest") == 7
    assert find_step(tmp_path, "4") == 4


def test_a_large_psnr_is_better_and_ranks_survive_a_restart(tmp_path):
    saved_with(tmp_path, [{"code": 9.0, "psnr": 20.0}, {"code": 1.0, "psnr": 22.0}], keep=1, keep_best=1, best="psnr")
    with contextlib.closing(Checkpoints(tmp_path, keep=1, keep_best=1, best="psnr")) as checkpoints:
        state, _ = restored(checkpoints)
        for found in ({"code": 5.0, "psnr": 21.0}, {"code": 1.0, "psnr": float("nan")}, {}):
            state = advance(state)
            checkpoints.save(state, {}, found)
    assert kept(tmp_path) == [2, 5]
    assert find_step(tmp_path, "best") == 2


def test_a_checkpoint_that_is_not_there_is_refused(two, tmp_path):
    with pytest.raises(
        ValueError, match=r"checkpoint is '7'; it must be newest, best or one of the complete steps \[1, 2\]"
    ):
        find_step(two, "7")
    damaged(two / "2", "half")
    with pytest.raises(ValueError, match=r"checkpoint is '2'; .* steps \[1\]"):
        find_step(two, "2")
    with pytest.raises(ValueError, match="has held-out figures; train with keep_best, or"):
        find_step(two, "best")
    with pytest.raises(ValueError, match="has no complete checkpoint yet"):
        find_step(tmp_path / "none" / "checkpoints")


@pytest.mark.parametrize("policy", [{"keep": 0}, {"keep": 1, "keep_every": -1}, {"keep": 1, "keep_best": -2}])
def test_policies_without_sense_are_refused(tmp_path, policy):
    with pytest.raises(ValueError, match="keep must be at least 1"):
        Checkpoints(tmp_path, **policy)


# parameters of another run


def test_matching_leaves_are_taken_over_and_named_ones_begin_anew(states, saved):
    mesh = make_mesh(MeshShape(data=1, fsdp=2), jax.devices()[:2])
    mine = init(jax.random.key(1)).params["model"] | {"bias": jnp.zeros(9), "extra": {"scale": jnp.ones(2)}}
    mine = jax.device_put(mine, shard(mine, mesh))
    loaded, stayed, unused = load_matching(saved / "1", mine, "model", ["bias$", "^extra/", "layer2/kernel"])
    assert stayed == ["bias", "extra/scale", "layer2/kernel"]
    assert unused == []
    source = states[1].params["model"]
    for name in ("layer0", "layer1"):
        assert_same(loaded[name], source[name])
        assert loaded[name]["kernel"].sharding == mine[name]["kernel"].sharding
    assert_same({k: loaded[k] for k in ("bias", "extra", "layer2")}, {k: mine[k] for k in ("bias", "extra", "layer2")})


def test_leaves_of_no_use_are_listed(saved):
    mine = {"layer1": init(jax.random.key(1)).params["model"]["layer1"]}
    loaded, stayed, unused = load_matching(saved / "1", mine, "ema")
    assert (stayed, unused) == ([], ["bias", "layer0/kernel", "layer2/kernel"])
    assert loaded.keys() == {"layer1"}


@pytest.mark.parametrize(
    ("changes", "fresh", "message"),
    [
        ({"bias": (9,)}, [], r"bias has shape \(5,\) in .*1, but the configured model needs shape \(9,\); add bias to `fresh`"),
        ({"more/scale": (2,)}, ["bias"], "more/scale is missing in .*; add more/scale to `fresh` to begin it anew"),
        ({}, ["layer0", "lier1"], r"fresh has 'lier1', which matches none of the parameters .*layer1/kernel"),
        ({}, ["."], "leaves nothing to load"),
    ],
)  # fmt: skip
def test_leaves_that_do_not_fit_and_patterns_that_match_nothing_are_refused(saved, changes, fresh, message):
    mine = init(jax.random.key(1)).params["model"]
    for name, shape in changes.items():
        mine = unflatten_dict(flatten_dict(mine, sep="/") | {name: jnp.zeros(shape)}, sep="/")
    with pytest.raises(ValueError, match=message):
        load_matching(saved / "1", mine, "model", fresh)
