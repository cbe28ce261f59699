"""Several processes of one command, in earnest: they find one another on 127.0.0.1 and do what one process does."""

import dataclasses
import http.server
import json
import os
import shutil
import signal
import tarfile
import threading
import time
from pathlib import Path

import hosts
import jax
import numpy as np
import pytest
from data.packing import add
from kill_training import arrays
from PIL import Image

from ar_jax.convert.sources import param_shapes
from ar_jax.data import Data, Info, open_records
from ar_jax.files import models
from ar_jax.machine import distributed
from ar_jax.machine.distributed import Launch, join, surroundings
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.train.checkpoint import latest_step, save_params

IMAGES, BATCH = 24, 4  # an epoch is six updates
CONFIG = """
from ar_jax.decode.guidance import Interval
from ar_jax.config import Experiment, GeneratorStage, Sampling
from ar_jax.data import Data
from ar_jax.generators.causal import Causal
from ar_jax.nets.conditioning import Label
from ar_jax.nets.transformer import Transformer
from ar_jax.train.optim import Optim


def get_config():
    return Experiment(
        name="{name}", out="{root}",
        data=Data(name="image_folder", path="{root}/images", size=8, crop="centre"),
        generator=GeneratorStage(
            module=Causal(Transformer(2, 16, 2, hidden=24, dropout=0.1), Label(16), dropout=0.1),
            steps=6, batch=4, optim=Optim(lr=1e-2, ema=0.5), drop=0.3, log_every=1, save_every=3,
            preview_every=3, preview_images=3, sampling=Sampling(Interval(2.0)),
        ),
    )
"""
# train.py, noting the examples of every update; an image's first pixel is its number
COUNTING = """
import json, os, sys
import jax
from ar_jax.train import __main__ as train

class Counting:
    def __init__(self, stream):
        self.stream, self.get_state, self.set_state = stream, stream.get_state, stream.set_state
    def __next__(self):
        batch = next(self.stream)
        with open(os.environ["SEEN"], "a") as file:  # by all processes
            file.write(json.dumps([jax.process_index(), batch["image"][:, 0, 0, 0].tolist()]) + chr(10))
        return batch

plain = train.batches
train.batches = lambda *given, train=True, **named: (
    Counting(plain(*given, **named)) if train else plain(*given, train=False, **named)
)
train.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Numbered images of three classes, and a tokenizer with random weights."""
    root = tmp_path_factory.mktemp("hosts")
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
        pixels[0, 0] = i
        file = root / "images" / f"class{i % 3}" / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    module = VQGAN((8, 8), features=4, mult=(1, 1), res_blocks=0, latent=4, codes=32, code_features=4, groups=2)
    shapes = param_shapes(module)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), shapes)
    data = dataclasses.asdict(Data(name="image_folder", path=str(root / "images"), size=8))
    models.describe(root / "vq", "tokenizer", module, Info(), {"data": data})
    save_params(root / "vq" / "params", params)
    return root


def training(place, name, *options):
    (place / f"{name}.py").write_text(CONFIG.format(name=name, root=place))
    return ["-c", COUNTING, place / f"{name}.py", "--tokenizer.path", place / "vq", *options]


def seen(file):
    """(process, numbers of the examples) of every share of a batch."""
    return [(process, set(numbers)) for process, numbers in map(json.loads, Path(file).read_text().splitlines())]


@pytest.fixture(scope="module")
def alone(place):
    """A run of one process."""
    hosts.run(training(place, "alone"), processes=1, env={"SEEN": place / "alone.txt"})
    return place / "alone"


@pytest.fixture(scope="module")
def moved(place):
    """The same run, begun by two processes that split the weights, ended by one."""
    split = ("--mesh.data", 1, "--mesh.fsdp", 2)
    hosts.run(training(place, "moved", "--generator.steps", 3, *split), env={"SEEN": place / "moved.txt"})
    shutil.copytree(place / "moved", place / "halfway")
    hosts.run(training(place, "moved"), processes=1, env={"SEEN": place / "moved.txt"})
    return place / "moved"


def metrics(run):
    lines = [json.loads(line) for line in (run / "generator" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_each_process_opens_its_own_tars_only(place, tmp_path):
    images = sorted((place / "images").rglob("*.png"), key=lambda file: file.name)
    for shard in range(3):
        with tarfile.open(tmp_path / f"part-{shard}.tar", "w") as tar:
            for file in images[8 * shard : 8 * shard + 8]:
                add(tar, f"{file.stem}.png", file.read_bytes())
                add(tar, f"{file.stem}.cls", file.parent.name.removeprefix("class").encode())
    data = ("--data.name", "webdataset", "--data.path", tmp_path / "part-{0..2}.tar", "--data.shards", "split")
    out = hosts.run(
        training(place, "tars", "--generator.steps", 3, "--generator.preview-every", 0, *data),
        env={"SEEN": tmp_path / "seen.txt", "AR_JAX_CACHE": tmp_path / "cache"},
    )
    assert "16 images of webdataset here, 3 classes" in out[0]
    assert "no held-out images" in out[0]
    shares = seen(tmp_path / "seen.txt")
    for process, own in ((0, {*range(8), *range(16, 24)}), (1, {*range(8, 16)})):
        numbers = [number for which, some in shares if which == process for number in some]
        assert len(set(numbers)) == 6, "its half of three batches"
        assert set(numbers) <= own
    assert latest_step(place / "tars" / "generator" / "checkpoints") == 3


def test_two_processes_train_to_the_losses_of_one_and_so_does_one_that_goes_on(alone, moved):
    one, two = metrics(alone), metrics(moved)
    assert [line["step"] for line in one] == [line["step"] for line in two] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "grad_norm"):
        expected = np.array([line[name] for line in one])
        np.testing.assert_allclose([line[name] for line in two], expected, rtol=1e-5)
        assert np.ptp(expected) > 1e-2, "the weights must have moved"
    for average in (True, False):
        weights = [models.open_model(run, "generator").params(average=average) for run in (alone, moved)]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), *weights)


def test_no_example_is_lost_or_repeated_when_two_processes_save_and_one_goes_on(place, alone, moved):
    one, two = seen(place / "alone.txt"), seen(place / "moved.txt")
    assert [len(numbers) for _, numbers in two] == [BATCH // 2] * 6 + [BATCH] * 3
    assert sorted(number for _, numbers in two for number in numbers) == list(range(IMAGES))
    shares = [[numbers for process, numbers in two[:6] if process == i] for i in range(2)]
    together = [a | b for a, b in zip(*shares)] + [numbers for _, numbers in two[6:]]
    assert together == [numbers for _, numbers in one], "every update has the examples that it has with one process"


def test_two_processes_show_the_pictures_of_one(alone, moved):
    for step in (3, 6):
        pictures = [np.asarray(Image.open(run / f"generator/samples/{step:07d}.png")) for run in (alone, moved)]
        assert np.abs(pictures[0].astype(int) - pictures[1]).max() <= 1


def test_one_process_writes_what_is_written_once(place, moved):
    assert len(list((place / "halfway" / "generator").glob("events.out.tfevents*"))) == 1
    assert json.loads((place / "halfway" / "run.json").read_text())["experiment"]["mesh"]["fsdp"] == 2
    assert not list((place / "halfway").glob(".shared-*"))
    kept = models.open_model(place / "halfway", "tokenizer").params()
    jax.tree.map(np.testing.assert_array_equal, kept, models.open_model(place / "vq", "tokenizer").params())


def test_two_processes_draw_the_images_of_one(alone, tmp_path):
    for processes in (1, 2):
        command = ("sample.py", alone, "--count", 7, "--batch", 4, "--out", tmp_path / f"{processes}.npz")
        hosts.run(command, processes=processes, devices=processes)
    one, two = (np.load(tmp_path / f"{processes}.npz")["arr_0"].astype(int) for processes in (1, 2))
    assert one.shape == (7, 8, 8, 3)
    assert len({image.tobytes() for image in one}) == 7
    assert np.abs(one - two).max() <= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.npz", "2.npz"]


def test_two_processes_complete_a_folder_of_images(alone, tmp_path):
    command = ("sample.py", alone, "--count", 7, "--batch", 2, "--out", tmp_path / "images")
    hosts.run(command, processes=1)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "images").iterdir()}
    gone = ["000001.png", "000004.png", "000006.png"]
    for name in gone:
        (tmp_path / "images" / name).unlink()
    said = hosts.run((*command, "--mesh.data", 1, "--mesh.tp", 2))  # both hold every image, one writes it
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "images").iterdir()}
    assert {name: content for name, (content, _) in after.items()} == {name: b for name, (b, _) in before.items()}
    assert [name for name in sorted(after) if after[name] != before[name]] == gone
    assert sum("7 images in" in text for text in said) == 1


def test_two_processes_cache_the_records_of_one(place, tmp_path):
    command = ("-m", "ar_jax.tokenize", place / "vq", "--batch", 4, "--shards", 3)
    for processes in (1, 2):
        said = hosts.run((*command, "--out", tmp_path / str(processes)), processes=processes)
        assert any(f"is complete: {IMAGES} records" in text for text in said)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("1", "2"))
    assert one == two
    assert len(one) == 10  # of each shard its labels, its tokens, and that it is whole
    assert len({open_records(tmp_path / "2")[i]["tokens"].tobytes() for i in range(IMAGES)}) > IMAGES // 2


def test_more_processes_than_shards_are_refused(place, tmp_path):
    command = ("-m", "ar_jax.tokenize", place / "vq", "--shards", 1, "--out", tmp_path / "out")
    for code, _, err in hosts.ended(hosts.started(command)):
        assert code == 1
        assert "give --shards at least 2" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("which", [0, 1])
def test_one_of_two_processes_waits_in_vain_and_says_so(place, which):
    begin = time.monotonic()
    command = training(place, "vain", "--launch.timeout", 3)
    ((code, _, err),) = hosts.ended(hosts.started(command, only=[which]))
    assert code == 1
    assert f"asks for 2 processes, but process {which} has waited 3 s for the others in vain" in err
    assert "Start the same command on every host" in err
    assert time.monotonic() - begin < 20
    assert not (place / "vain").exists()


@pytest.mark.parametrize("victim", [0, 1])
def test_all_processes_stop_when_one_is_killed(place, victim):
    name = f"killed{victim}"
    endless = ("--generator.steps", 10**6, "--generator.save-every", 10**6, "--generator.preview-every", 0)
    command = training(place, name, *endless, "--launch.heartbeat", 5)
    running = hosts.started(command, env={"SEEN": place / f"{name}.txt"})
    log = place / name / "generator" / "metrics.jsonl"
    end = time.monotonic() + 60
    while not (log.exists() and log.read_text()):
        assert time.monotonic() < end, hosts.ended(running)
        time.sleep(0.1)
    running[victim].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    assert running[1 - victim].wait(60) != 0
    assert time.monotonic() - begin < 20
    hosts.ended(running)


def test_a_failure_of_one_process_ends_the_other(place, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    (code, _, said), (other, _, _) = hosts.ended(
        hosts.started(("sample.py", place / "alone", "--out", tmp_path / "out"))
    )
    assert code == 1
    assert "sample.py, process 0 of 2" in said
    assert "was not begun by sample.py" in said
    assert other != 0


def test_a_folder_that_is_not_shared_is_refused(tmp_path):
    code = (
        "import sys, pathlib, jax, tyro; from ar_jax.machine import distributed\n"
        "with distributed.command('test'):\n"
        "    distributed.join(tyro.cli(distributed.Launch, args=[a.replace('launch.', '') for a in sys.argv[2:]]))\n"
        "    distributed.check_shared(pathlib.Path(sys.argv[1]) / str(jax.process_index()), patience=0.5)\n"
    )
    for i in range(2):
        (tmp_path / str(i)).mkdir()
    (_, _, _), (status, _, said) = hosts.ended(hosts.started(("-c", code, tmp_path)))
    assert status == 1
    assert f"{tmp_path / '1'} is not the same folder here as on process 0" in said


# what needs no second process


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (Launch("10.0.0.2:8476"), "launch.processes=0 and launch.process=-1 do not go together; give all three"),
        (Launch("10.0.0.2:8476", 2), "launch.process=-1 do not go together"),
        (Launch("10.0.0.2:8476", 2, 2), "launch.process=2 do not go together"),
        (Launch(processes=2, process=0), "launch.coordinator='', launch.processes=2 and launch.process=0 do not"),
        (Launch(process=0), "do not go together"),
        (Launch(processes=-2), "launch.processes=-2 and launch.process=-1 do not go together"),
        (Launch("10.0.0.2", 2, 0), "launch.coordinator is '10.0.0.2'; it must be HOST:PORT"),
        (Launch("10.0.0.2:http", 2, 0), "must be HOST:PORT"),
        (Launch("10.0.0.2:70000", 2, 0), "must be HOST:PORT"),
        (Launch(timeout=0), "launch.timeout and launch.heartbeat are 0 and 100; they must be at least 1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(launch, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        join(launch)
    assert not jax.distributed.is_initialized()


def test_a_port_in_use_is_refused():
    with hosts.socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"launch\.coordinator is '127.0.0.1:{port}', but .* give a free port"):
            join(Launch(f"127.0.0.1:{port}", 2, 0))


@pytest.fixture
def nowhere(monkeypatch):
    """An environment in which nothing tells of other processes."""
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "TPU_", "MEGASCALE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    return monkeypatch


@pytest.mark.parametrize(
    ("env", "found"),
    [
        ({}, 1),
        ({"SLURM_NTASKS": "1"}, 1),
        ({"SLURM_NTASKS": "16"}, 16),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, 3),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, 1),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, 4),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "3"}, 6),
        ({"TPU_PROCESS_ADDRESSES": "local", "TPU_WORKER_HOSTNAMES": "a,b"}, 1),
    ],
)
def test_the_environment_tells_how_many_processes_belong_together(nowhere, env, found):
    for name, value in env.items():
        nowhere.setenv(name, value)
    assert surroundings()[1] == found
    if found > 1:  # none of these can be joined here, and alone none goes on
        with pytest.raises(ValueError, match=rf"asks for {found} processes, but they cannot be connected"):
            join(Launch())
    join(Launch(processes=1))
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    ("attributes", "found"),
    [
        ({}, 1),
        ({"worker-network-endpoints": "10.0.0.2", "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-8'\nWORKER_ID: '0'\n"}, 1),
        ({"worker-network-endpoints": "x:1:10.0.0.2,y:2:10.0.0.3", "tpu-env": "WORKER_ID: '0'\n"}, 2),
        ({"worker-network-endpoints": "10.0.0.2,10.0.0.3", "tpu-env": "MEGASCALE_NUM_SLICES: '2'\n"}, 4),
    ],
)
def test_a_cloud_tpu_machine_tells_its_hosts(nowhere, attributes, found):
    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            value = attributes.get(self.path.removeprefix("/computeMetadata/v1/instance/attributes/"))
            self.send_response(404 if value is None or self.headers["Metadata-Flavor"] != "Google" else 200)
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    nowhere.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
    nowhere.delenv("TPU_SKIP_MDS_QUERY")
    assert surroundings()[1] == found
    server.shutdown()


def test_processes_of_one_machine_and_of_one_set_of_cores_are_counted(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3}, raising=False)
    known = []

    def gathered(mine):
        known.append(mine)
        return np.stack([mine, mine, [mine[0], 1], [2, 3]])  # the second has the same cores, the fourth another machine

    monkeypatch.setattr(distributed.multihost_utils, "process_allgather", gathered)
    assert distributed._count_host() == distributed.Host(processes=3, sharing=2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {4, 5}, raising=False)
    distributed._count_host()
    assert known[0][0] == known[1][0]
    assert known[0][1] != known[1][1]


def test_a_command_alone_ends_in_one_sentence():
    with pytest.raises(SystemExit, match=r"^some\.py: no such thing$"), distributed.command("some.py"):
        raise ValueError("no such thing")
    with pytest.raises(KeyError), distributed.command("some.py"):
        raise KeyError("a bug keeps its traceback")


def test_all_processes_save_the_same_update_when_one_is_told_to_stop_and_go_on_to_the_same_bits(place):
    steps, names = 60, ("untold", "told")
    split = ("--mesh.data", 1, "--mesh.fsdp", 2, "--generator.preview-every", 0, "--generator.save-every", 20)
    commands = [training(place, name, "--generator.steps", steps, *split) for name in names]
    hosts.run(commands[0], env={"SEEN": place / "untold.txt"})
    running = hosts.started(commands[1], env={"SEEN": place / "told.txt"})
    log = place / names[1] / "generator" / "metrics.jsonl"
    end = time.monotonic() + 60
    while not (log.exists() and log.read_text()):
        assert time.monotonic() < end, hosts.ended(running)
        time.sleep(0.01)
    running[1].send_signal(signal.SIGTERM)
    results = hosts.ended(running)
    assert [code for code, _, _ in results] == [75, 75], results
    step = latest_step(place / names[1] / "generator" / "checkpoints")
    assert 1 <= step < steps
    assert f"generator: told to stop, saved update {step}; the same command goes on" in results[0][1]
    assert "told to stop" not in results[1][1]
    hosts.run(commands[1], env={"SEEN": place / "told.txt"})
    assert arrays(place / names[1], "generator") == arrays(place / names[0], "generator")
