"""FlashAR: parts of two neighbours, the separate losses, what a raster model lacks, files, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from ar_jax.config import load_config
from ar_jax.convert.__main__ import main
from ar_jax.convert.names import to_weights
from ar_jax.convert.sources import export, param_shapes
from ar_jax.data import Info
from ar_jax.generators.flashar import Fused
from ar_jax.tokens import TokenSpec, grid, pyramid
from ar_jax.train.loop import partners

SPEC = TokenSpec(grid(2, 2), codes=(5,))


def test_an_unlearned_gate_takes_the_mean_and_a_learned_one_the_token_that_it_is_for():
    head = Fused().complete(SPEC)
    random = np.random.default_rng(0)
    h = jnp.asarray(random.normal(size=(2, 3, 10)), jnp.float32).at[..., 8:].set(jnp.array([[1, 1], [1, 0], [0, 1]]))
    params = head.init(jax.random.key(0), h)["params"]
    params = jax.tree.map(lambda x: jnp.asarray(random.normal(0, 0.4, x.shape), jnp.float32), params)
    gate = {name: jax.tree.map(jnp.zeros_like, leaf) if "gate" in name else leaf for name, leaf in params.items()}
    each = np.stack([h[..., :4] @ params["readout"]["kernel"], h[..., 4:8] @ params["others_0"]["kernel"]])
    want = np.stack([each[:, :, 0].mean(0), each[0, :, 1], each[1, :, 2]], axis=1)
    np.testing.assert_allclose(head.apply({"params": gate}, h), want, atol=1e-5)
    learned = head.apply({"params": params}, h)
    np.testing.assert_allclose(learned[:, 1:], want[:, 1:], atol=1e-5)
    part = (learned[:, 0] - each[1, :, 0]) / (each[0, :, 0] - each[1, :, 0])
    np.testing.assert_allclose(part, part[:, :1].repeat(5, 1), atol=1e-4)
    assert abs(part[0, 0] - part[1, 0]) > 1e-3
    assert ((part > 0) & (part < 1)).all()


def test_separate_losses_are_means_over_the_tokens_of_each_neighbour():
    head = Fused(apart=0.3, column=0.5).complete(SPEC)
    there = jnp.array([[1.0, 1], [1, 0], [0, 1], [1, 1]])[None].repeat(2, 0)
    each = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 2)), jnp.float32)
    valid = jnp.ones((2, 4)).at[1, 3].set(0)
    kept = np.ones((2, 4), bool)
    kept[1, 3] = False
    beside, above = kept & (np.arange(4) != 2), kept & (np.arange(4) != 1)
    want = 0.3 * each[beside, 0].mean() + 0.7 * each[above, 1].mean() + 0.5 * each[:, 2, 1].mean()
    found = head.separate(each, there, valid)
    np.testing.assert_allclose((found * valid).sum() / valid.sum(), want, rtol=1e-5)


def test_the_config_begins_anew_what_a_raster_model_lacks_as_what_it_has():
    ours, base = load_config("flashar:mnist5k"), load_config("llamagen:mnist5k")
    spec, info = base.tokenizer.module.spec, Info(classes=10)
    have = flatten_dict(param_shapes(base.generator.module.complete(spec, info)), sep="/")
    want = param_shapes(ours.generator.module.complete(spec, info))
    anew = {name for pair in ours.generator.alike for name in partners(want, *pair)}
    assert {name for name in flatten_dict(want, sep="/") if name not in have} == anew | {
        *("head/gate_in/kernel", "head/gate_out/kernel", "head/gate_out/bias"),
    }


@pytest.mark.parametrize("fields", [{}, {"mix": "scalar"}])
def test_files_there_and_back(tmp_path, fields):
    module = load_config("flashar:mnist5k").generator.module.clone(head=Fused(**fields))
    module = module.complete(TokenSpec(grid(16, 16), codes=(64,)), Info(classes=3))
    random, found = np.random.default_rng(2), export(module, "generator")
    assert found.family == "flashar"
    params = jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), found.params)
    weights = to_weights(params, found.rules)
    save_file(weights, tmp_path / "a.safetensors")
    main([str(tmp_path / "a.safetensors"), "--to", str(tmp_path / "model"), "--heads", "4"])
    main([str(tmp_path / "model"), "--back", str(tmp_path / "back.safetensors")])
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == weights.keys()
    assert all(np.array_equal(back[key], value) for key, value in weights.items())


@pytest.mark.parametrize(
    ("head", "spec", "message"),
    [
        (Fused(mix="mean"), SPEC, r"head\.mix is 'mean'; it must be gate or scalar"),
        (Fused(column=0.5), SPEC, r"head\.column is 0\.5, but head\.apart is None; give both"),
        (Fused(chunk=4), SPEC, r"head has chunk 4, smoothing 0\.0 and z_loss 0\.0, which Fused has not"),
        (Fused(), TokenSpec(pyramid((2, 2)), codes=(5,)), r"tokens of 3 axes have more"),
    ],
)
def test_what_does_not_fit_is_refused(head, spec, message):
    with pytest.raises(ValueError, match=message):
        head.complete(spec)
