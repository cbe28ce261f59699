"""What is rounded to bfloat16 and what is not."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from cases_continuous import CASES as CONTINUOUS

from ar_jax.data import Info
from ar_jax.files.models import describe, open_model
from ar_jax.heads.diffusion import Diffusion
from ar_jax.machine.flops import with_fields
from ar_jax.nets.linear import cast, float32_gradients
from ar_jax.tokenizers.patches import Patches
from ar_jax.train.checkpoint import save_params
from ar_jax.train.recipes import generator_loss

BF16 = jnp.bfloat16


def paths(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("name", ["var", "llamagen_caption", "rar"])
def test_kernels_and_embeddings_are_rounded_and_nothing_else_is(name):
    params = CASES[name].params
    for path, leaf in paths(cast(params, BF16)).items():
        rounded = path.endswith(("['kernel']", "['embedding']"))
        assert (leaf.dtype == BF16) == rounded, path
        if not rounded:
            np.testing.assert_array_equal(leaf, paths(params)[path])


def test_a_model_folder_opened_in_bfloat16_keeps_the_sharpness_of_attention(tmp_path):
    case = CASES["var"]
    describe(tmp_path, "generator", case.generator, Info(classes=3), {})
    save_params(tmp_path / "params", case.params)
    opened = paths(open_model(tmp_path, "generator").params(BF16))
    sharp = "['backbone']['blocks']['log_scale']"
    np.testing.assert_array_equal(opened[sharp], paths(case.params)[sharp])
    assert opened["['backbone']['blocks']['qkv']['kernel']"].dtype == BF16


@pytest.mark.parametrize("steps", ["100", "25"])
def test_with_an_exact_denoiser_the_first_step_keeps_the_spread(steps):
    """Data of unit variance stay so at every noise level; at the noisiest, what rounds the noise counts 20,000 times."""
    channels = 4
    head = Diffusion(16, 1, channels, steps=steps, dtype=BF16)
    chain = head.chains(1)[0].at((0, 0))
    h = jnp.zeros((1, 4096, 8))
    x, more = (jax.random.normal(jax.random.key(i), (1, 4096, channels)) for i in range(2))
    exact = jnp.sqrt(1 - chain.kept) * x

    def perfect(call, arguments, keywords, context):
        """The last layer sees the noise, in three parts that bfloat16 holds, and its kernel adds them up."""
        if context.module.name != "output":
            return call(*arguments, **keywords)
        parts, rest = [], exact
        for _ in range(3):
            parts.append(rest.astype(BF16))
            rest = rest - parts[-1].astype(jnp.float32)
        last = jnp.concatenate([*parts, jnp.zeros((*x.shape[:2], 4), BF16)], axis=-1)
        return call(last, **keywords)

    @jax.jit
    def guessed(x):
        with nn.intercept_methods(perfect):
            params = jax.tree.map(jnp.zeros_like, head.init(jax.random.key(0), x, method=net)["params"])
            params["net"]["output"]["kernel"] = jnp.pad(
                jnp.tile(jnp.eye(channels, 2 * channels), (3, 1)), ((0, 4), (0, 0))
            )
            params["net"]["output"]["bias"] = jnp.repeat(jnp.array([0.0, 1.0]), channels)
            return head.apply({"params": params}, x, method=net)

    def net(self, x):
        return self.net(x, jnp.full(x.shape[:2], chain.t, jnp.float32), h)

    noise, variance = jnp.split(guessed(x), 2, axis=-1)
    after = chain.mean(x, chain.clean(x, noise)) + jnp.exp(0.5 * chain.log_variance(variance)) * more
    assert float(after.std()) == pytest.approx(1.0, abs=0.02)


def products(jaxpr):
    """Shape and dtype of the results of all matrix products in a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.outvars[0].aval.shape, equation.outvars[0].aval.dtype
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from products(inner)


@pytest.mark.parametrize(
    "case", [CASES["llamagen_label"], CASES["var"], CONTINUOUS["mar"]], ids=["llamagen", "var", "mar"]
)
def test_gradients_of_kernels_leave_their_products_in_float32_if_asked(case):
    generator = with_fields(case.generator, dtype=BF16, remat="none")
    tokenizer = getattr(case, "pyramid", None) or Patches((6, 6), 2)
    loss = generator_loss(generator, tokenizer, case.order, 0.1)
    frozen = jax.eval_shape(tokenizer.init_params, jax.random.key(0))
    batch = case.batch | {"tokens": case.tokens}
    kernels = {leaf.shape[-2:] for path, leaf in paths(case.params).items() if path.endswith("['kernel']")}
    kernels = {shape for shape in kernels if case.images not in shape}  # of rows

    def rounded(float32):
        def grad(params, frozen):
            with float32_gradients(float32):
                return jax.grad(loss, has_aux=True)(params, frozen, batch, jax.random.key(0), jnp.int32(0))[0]

        found = list(products(jax.make_jaxpr(grad)(case.params, frozen).jaxpr))
        return {shape for shape, dtype in found if shape in kernels and dtype == BF16}

    assert rounded(False)
    assert not rounded(True)
