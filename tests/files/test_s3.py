"""Runs in s3://, which Orbax does not know by itself; with Amazon's clients and a server beside them, where they are installed."""

import logging

import numpy as np
import pytest
from kill_training import arrays
from test_train_sample import CONFIG, QUIET, quick  # noqa: F401

from ar_jax import sample
from ar_jax.files import places
from ar_jax.files.places import path_of, sizes
from ar_jax.train import __main__ as train
from ar_jax.train import checkpoint


def test_tensorstore_is_asked_for_s3_as_for_gs(monkeypatch):
    from orbax.checkpoint._src.serialization import tensorstore_utils

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://here:1")
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    checkpoint._teach_s3()
    spec = tensorstore_utils.build_kvstore_tspec("s3://bucket/runs/x/3/model")
    where = {"path": "runs/x/3/model", "endpoint": "http://here:1", "aws_region": "eu-north-1"}
    assert spec["base"] == {"driver": "s3", "bucket": "bucket", **where}
    spec = tensorstore_utils.build_kvstore_tspec("gs://bucket/runs/x")
    assert spec["base"] == {"driver": "gcs", "bucket": "bucket", "path": "runs/x"}
    assert tensorstore_utils.build_kvstore_tspec("/runs/x")["base"]["driver"] == "file"


@pytest.fixture
def server(monkeypatch):
    s3fs, moto = pytest.importorskip("s3fs"), pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = moto.ThreadedMotoServer(port=0)
    running.start()
    variables = {"AWS_ENDPOINT_URL": "http://{}:{}".format(*running.get_host_and_port()), "AWS_REGION": "us-east-1"}
    variables |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_EC2_METADATA_DISABLED": "true"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    places._client.cache_clear()
    s3fs.S3FileSystem().mkdir("bucket")
    yield
    running.stop()


def test_a_stopped_run_goes_on_to_the_same_bits(server, tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny.py").write_text(CONFIG)

    def trained(out):
        train.main([str(tmp_path / "tiny.py"), "--out", str(out), *QUIET])

    def fails(self):
        if self._saving[0] == 6:
            raise OSError("the network is down")
        whole(self)

    whole = checkpoint.Checkpoints._list_contents
    trained(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "_list_contents", fails)
        with pytest.raises(
            SystemExit, match="could not write a checkpoint to s3://bucket/runs/whole/generator/checkpoints"
        ):
            trained("s3://bucket/runs")
    run = path_of("s3://bucket/runs/whole")
    assert any(name.startswith("generator/checkpoints/6/") for name in sizes(run))
    assert checkpoint.latest_step(run / "generator" / "checkpoints") == 3
    capsys.readouterr()
    trained("s3://bucket/runs")
    assert "resumed at update 3" in str(capsys.readouterr())
    assert arrays(run, "generator") == arrays(tmp_path / "whole", "generator")
    sample.main([str(run), "--count", "2", "--out", "s3://bucket/x.npz"])
    sample.main([str(tmp_path / "whole"), "--count", "2", "--out", str(tmp_path / "x.npz")])
    with np.load(places.seekable(path_of("s3://bucket/x.npz"))) as there, np.load(tmp_path / "x.npz") as here:
        np.testing.assert_array_equal(there["arr_0"], here["arr_0"])
    assert not any(".parts" in name for name in sizes(path_of("s3://bucket")))
