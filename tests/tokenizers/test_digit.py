"""DiGIT: the nearest of a teacher's clustered features, a decoder that alone is trained, and its generator's closed forms."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax import codebook
from ar_jax.config import Losses
from ar_jax.convert.sources import param_shapes
from ar_jax.data import Data
from ar_jax.files.models import open_model
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.attention import Rows
from ar_jax.nets.post_norm import PostNorm
from ar_jax.tokenizers.feature_codes import FeatureCodes
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.train.exported import Exported
from ar_jax.train.optim import Optim, schedule
from ar_jax.train.tokenizer import tokenizer_gradients

RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Every fourth pixel, three numbers wide, as a map twice as fine as the codes."""
    path = tmp_path_factory.mktemp("teacher") / "some.export"
    (batch,) = jax.export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct((batch, 32, 32, 3), jnp.float32)
    path.write_bytes(jax.export.export(jax.jit(lambda image: image[:, ::4, ::4] + 1))(shape).serialize())
    return Exported(str(path))


def small(teacher):
    return FeatureCodes(
        (32, 32), features=4, mult=(1, 1, 1, 1), res_blocks=0, latent=4, codes=6, feature_width=3, groups=2, attention=(),
        teacher=teacher,
    )  # fmt: skip


def test_codes_are_the_nearest_features_and_only_the_decoder_learns(teacher):
    tokenizer = small(teacher)
    params = jax.tree.map(lambda x: RANDOM.normal(0, 0.5, x.shape).astype(np.float32), param_shapes(tokenizer))
    image = RANDOM.integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    grad_fn = tokenizer_gradients(tokenizer, Losses(lpips=0.0, adversarial=0.0))

    @jax.jit
    def run(params):
        tokens = tokenizer.apply({"params": params}, image / np.float32(127.5) - 1, method="encode")
        extra = {"age": jnp.zeros(6, jnp.int32), "frequency": jnp.zeros((1, 6))}
        grads, _, figures = grad_fn({"model": params}, extra, {}, {"image": image}, jax.random.key(0), 0)
        return tokens, grads["model"], figures

    tokens, grads, figures = run(params)
    seen = (image[:, ::4, ::4] / 127.5).reshape(2, 4, 2, 4, 2, 3).mean((2, 4)).reshape(2, 16, 1, 3)
    want = np.square(seen - params["frozen"]).sum(-1).argmin(-1)
    np.testing.assert_array_equal(np.asarray(tokens)[..., 0], want)
    assert not np.any(grads.pop("frozen"))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))
    assert figures.keys() >= {"reconstruction", "usage", "code_perplexity"}


def test_the_command_clusters_all_images_on_the_grid_of_the_codes(teacher, tmp_path):
    options = codebook.Options(str(tmp_path / "made"), Data(name="mnist5k", size=32, split="test"), batch=500)
    codebook.write(small(teacher), options)
    model = open_model(options.out, "tokenizer")
    assert model.module == small(teacher)
    frozen = np.asarray(model.params()["frozen"])
    assert len(np.unique(frozen, axis=0)) == 6
    assert frozen.min() > -0.01, "the teacher's numbers begin at 0"


def test_missing_teachers_and_other_tokenizers_are_refused(tmp_path):
    tokenizer = small(Exported("nowhere.export"))
    assert param_shapes(tokenizer)["frozen"].shape == (6, 3), "built without the teacher"
    image = jnp.zeros((1, 32, 32, 3))
    with pytest.raises(ValueError, match=r"tokenizer\.teacher\.path is 'nowhere\.export', which is no file"):
        jax.eval_shape(lambda p: tokenizer.apply({"params": p}, image, method="encode"), param_shapes(tokenizer))
    options = codebook.Options(str(tmp_path / "made"), Data(name="mnist5k", size=32, split="test"))
    with pytest.raises(ValueError, match=r"--teacher\.path is 'nowhere\.export', which is no file"):
        codebook.write(tokenizer, options)
    with pytest.raises(ValueError, match=r"tokenizer is VQGAN; only VQGANLC, FeatureCodes and Clustered have what k-means finds"):
        codebook.write(VQGAN(), options)


def test_features_of_another_width_are_refused(teacher):
    tokenizer, image = small(teacher).clone(feature_width=5), jnp.zeros((1, 32, 32, 3))
    with pytest.raises(ValueError, match=r"tokenizer\.feature_width is 5, but the teacher's features are 3 wide"):
        jax.eval_shape(lambda p: tokenizer.apply({"params": p}, image, method="encode"), param_shapes(tokenizer))


def test_smoothed_labels_share_a_part_among_all_others():
    """As fairseq: (1 - e - e/(v-1)) nll + e/(v-1) times the sum of all."""
    logits, target = RANDOM.normal(size=(2, 3, 5)).astype(np.float32), RANDOM.integers(0, 5, (2, 3, 1))
    head = Categorical(codes=5, smoothing=0.1)
    eye = {"params": {"readout": {"kernel": jnp.eye(5)}}}
    found = head.apply(eye, logits, jnp.asarray(target), method="loss")
    nll = -np.asarray(jax.nn.log_softmax(logits))
    own = np.take_along_axis(nll, target, -1)[..., 0]
    np.testing.assert_allclose(found, (1 - 0.1 - 0.1 / 4) * own + 0.1 / 4 * nll.sum(-1), rtol=1e-5)
    plain = head.clone(smoothing=0.0).apply(eye, logits, jnp.asarray(target), method="loss")
    np.testing.assert_allclose(plain, own, rtol=1e-5)


def test_norms_come_after_the_sums_and_rows_are_multiplied_with_the_root_of_the_width():
    net = PostNorm(1, 8, 2, hidden=12, rows=5)
    x = RANDOM.normal(size=(2, 3, 8)).astype(np.float32)
    rows = Rows(np.arange(3, dtype=np.int32))
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), x, rows))["params"]
    params = jax.tree.map(lambda leaf: RANDOM.normal(0, 0.5, leaf.shape).astype(np.float32), shapes)
    found = jax.jit(lambda params: net.apply({"params": params}, x, rows)[0])(params)

    block = jax.tree.map(lambda leaf: leaf[0], params["blocks"])
    linear = lambda name, x: x @ block[name]["kernel"] + block[name]["bias"]  # noqa: E731

    def norm(name, x):
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return y * block[name]["scale"] + block[name]["bias"]

    h = x * 8**0.5 + params["positions"][:3]
    q, k, v = np.moveaxis(linear("qkv", h).reshape(2, 3, 2, 3, 4), (3, 2), (0, 2))  # head by head
    scores = np.where(np.tri(3, dtype=bool), q @ k.swapaxes(-1, -2) / 2, -np.inf)
    h = norm(
        "attention_norm", h + linear("out", (np.asarray(jax.nn.softmax(scores)) @ v).swapaxes(1, 2).reshape(2, 3, 8))
    )
    want = norm("mlp_norm", h + linear("fc2", np.asarray(jax.nn.gelu(linear("fc1", h), approximate=False))))
    np.testing.assert_allclose(found, want, atol=1e-5)


def test_the_rate_falls_with_the_root_of_the_updates():
    rate = schedule(Optim(lr=2.0, warmup=4, schedule="inverse_sqrt"), 100)
    np.testing.assert_allclose([rate(2), rate(4), rate(16), rate(64)], [1, 2, 1, 0.5], rtol=1e-6)
