import itertools
import os
import threading
import time

import numpy as np
import pytest
from PIL import Image

from ar_jax.data import Data, Info, Unreadable, batches, open_source, pipeline
from ar_jax.data.sources import Skipping
from ar_jax.machine import distributed
from ar_jax.machine.distributed import Host


class Numbered:
    """Images whose label is their index, with a gradient so that crops and flips can be told apart."""

    def __init__(self, count, bad=()):
        self.count, self.bad, self.info = count, bad, Info(classes=count)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.bad:
            raise Unreadable(f"nr {index}", "test")
        ramp = np.arange(60, dtype=np.uint8).reshape(6, 10) + index
        return {"image": np.repeat(ramp[..., None], 3, -1), "label": index}


DATA = Data(size=4, crop="random", flip=True)


def _rows(process, processes, batch=6):
    return np.arange(batch).reshape(processes, -1)[process]


def _take(count, *, records=12, batch=6, seed=0, process=0, processes=1, data=DATA):
    stream = batches(Numbered(records), data, batch=batch, seed=seed, rows=_rows(process, processes, batch))
    return list(itertools.islice(stream, count))


def _labels(taken):
    return [label for batch in taken for label in batch["label"].tolist()]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_each_epoch_shows_each_image_once_over_all_processes(processes):
    shares = [_take(4, process=i, processes=processes) for i in range(processes)]
    assert all(len(batch["label"]) == 6 // processes for share in shares for batch in share)
    epochs = [sorted(_labels([b for share in shares for b in share[2 * e : 2 * e + 2]])) for e in range(2)]
    assert epochs == [list(range(12))] * 2


def test_epochs_and_seeds_have_their_own_order():
    first, second = _labels(_take(2)), _labels(_take(4))[12:]
    assert first != second
    assert first != list(range(12))
    assert first != _labels(_take(2, seed=1))


def test_batches_depend_on_the_seed_only():
    for one, other in zip(_take(3), _take(3), strict=True):
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


@pytest.mark.parametrize("rows", [[0, 1, 2], [3, 4, 5], [1, 4, 5], [2]])
def test_a_process_reads_its_rows_of_the_batches_of_one_process(rows):
    share = batches(Numbered(12), DATA, batch=6, seed=0, rows=np.array(rows))
    for batch in _take(3):
        mine = next(share)
        for key in batch:
            np.testing.assert_array_equal(batch[key][rows], mine[key])


def test_every_epoch_crops_anew():
    taken = _take(20, records=1, batch=1)
    assert len({batch["image"].tobytes() for batch in taken}) > 10


def test_the_state_resumes_on_another_number_of_processes():
    stream = batches(Numbered(12), DATA, batch=6, seed=0)
    next(stream)
    state = stream.get_state()
    assert state == {"global_next_index": 6}
    rest = [next(stream) for _ in range(2)]
    for i in range(2):
        other = batches(Numbered(12), DATA, batch=6, seed=0, rows=_rows(i, 2))
        next(other)
        other.set_state(state)
        for batch in rest:
            np.testing.assert_array_equal(batch["image"][_rows(i, 2)], next(other)["image"])
        assert other.get_state() == {"global_next_index": 18}


def test_a_state_is_valid_for_another_batch_size():
    stream = batches(Numbered(12), DATA, batch=6, seed=0)
    next(stream)
    other = batches(Numbered(12), DATA, batch=4, seed=0)
    other.set_state(stream.get_state())
    assert _labels([next(other) for _ in range(3)]) == _labels([next(stream), next(stream)])


def test_batches_have_the_promised_types():
    batch = _take(1)[0]
    assert (batch["image"].shape, batch["image"].dtype) == ((6, 4, 4, 3), np.uint8)
    assert (batch["label"].shape, batch["label"].dtype) == ((6,), np.int32)
    unlabelled = Numbered(3)
    unlabelled.info = Info()
    assert set(next(batches(unlabelled, DATA, batch=3, seed=0))) == {"image"}


def test_evaluation_is_one_pass_in_order_without_augmentation():
    taken = list(batches(Numbered(7), DATA, batch=3, seed=0, train=False))
    assert [len(batch["label"]) for batch in taken] == [3, 3, 1]
    assert _labels(taken) == list(range(7))
    again = list(batches(Numbered(7), DATA, batch=7, seed=5, train=False))
    np.testing.assert_array_equal(np.concatenate([b["image"] for b in taken]), again[0]["image"])


def test_half_of_the_images_are_flipped():
    data = Data(size=6, crop="centre", flip=True)
    images = np.concatenate([batch["image"] for batch in _take(100, records=1, batch=2, data=data)])
    mirrored = images[:, 0, 0, 0] > images[:, 0, -1, 0]
    assert 60 < mirrored.sum() < 140


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ValueError, match="batch is 0"):
        next(batches(Numbered(12), DATA, batch=0, seed=0))


def test_unreadable_images_stop_or_are_replaced_in_batches_too():
    with pytest.raises(ValueError, match="cannot read nr 2"):
        list(batches(Numbered(4, bad=[2]), DATA, batch=4, seed=0, train=False))
    source = Skipping(Numbered(4, bad=[2]), limit=1)
    assert _labels(batches(source, DATA, batch=4, seed=0, train=False)) == [0, 1, 3, 3]
    assert source.unreadable == ["nr 2"]
    source = Skipping(Numbered(4, bad=[1, 2]), limit=1)
    with pytest.raises(ValueError, match="unreadable_limit=1"):
        list(batches(source, DATA, batch=4, seed=0, train=False))


def test_labels_outside_the_classes_are_refused():
    source = Numbered(4)
    source.info = Info(classes=3)
    with pytest.raises(ValueError, match=r"label 3, outside 0\.\.2"):
        list(batches(source, DATA, batch=4, seed=0, train=False))


def test_a_folder_of_odd_images_becomes_batches(tmp_path):
    for i, mode in enumerate(("RGB", "L", "RGBA", "P", "1", "LA")):
        Image.new(mode, (5 + i, 20 - i)).save(tmp_path / f"{i}.png")
    data = Data(name="image_folder", path=str(tmp_path), size=8, crop="random")
    assert next(batches(open_source(data), data, batch=6, seed=0))["image"].shape == (6, 8, 8, 3)


@pytest.mark.parametrize(
    ("host", "batch", "ahead"),
    [
        (Host(), 2**20, 32),  # of 64 cores
        (Host(), 2**28, 8),  # what 2 GB hold
        (Host(), 2**31, 2),
        (Host(8, 8), 2**20, 8),  # eight processes share the cores and the memory
        (Host(8, 8), 2**27, 2),
        (Host(8, 1), 2**20, 32),  # each is bound to cores of its own
    ],
)
def test_threads_and_batches_ahead_follow_from_what_the_process_has_to_itself(monkeypatch, host, batch, ahead):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 256)
    monkeypatch.setattr(distributed, "_host", host)
    assert distributed.cores() == 64 // host.sharing
    assert pipeline.read_options(batch, 32).prefetch_buffer_size == ahead
    assert pipeline.read_options(batch, 2).num_threads == 2


def test_large_batches_are_read_by_all_threads_but_few_are_held(monkeypatch):
    monkeypatch.setattr(pipeline, "AHEAD", 1)
    monkeypatch.setattr(distributed, "cores", lambda: 8)
    barrier, read = threading.Barrier(8), []

    class Together(Numbered):
        def __getitem__(self, index):
            read.append(index)
            barrier.wait(timeout=60)  # until eight threads are here
            return super().__getitem__(index)

    stream = batches(Together(160), DATA, batch=16, seed=0)
    next(stream)
    time.sleep(0.2)
    assert len(read) <= 3 * 16, "one batch was taken, two are ahead"
