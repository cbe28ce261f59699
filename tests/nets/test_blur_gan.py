import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.nets.blur_gan import BLUR, BlurGan, blurred, largest
from ar_jax.nets.patchgan import lecam_of_means


def shapes_of(net, side):
    return jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros((1, side, side, 3)), {}, True))


def test_published_size():
    net, shapes = BlurGan(), shapes_of(BlurGan(), 256)
    kernels = 75 * 128 + 9 * (128 * 128 + 128 * 256 + 256 * 512) + 512 * 512 + 25 * 512
    others = 128 + 3 * (128 + 256 + 512) + 512 + 1
    assert sum(x.size for x in jax.tree.leaves(shapes)) == kernels + others
    logits, stats = jax.eval_shape(lambda p: net.apply(p, jnp.zeros((1, 256, 256, 3)), {}, True), shapes)
    assert (logits.shape, stats) == ((1, 16, 16, 1), {})
    assert jax.eval_shape(lambda p: net.apply(p, jnp.zeros((1, 36, 20, 3)), {}, True), shapes)[0].shape == (
        1,
        16,
        16,
        1,
    )


def test_blur_by_hand():
    x = np.random.default_rng(0).normal(size=(1, 6, 5, 2)).astype("f4")
    kernel, padded = np.outer(BLUR, BLUR) / 64, np.pad(x, ((0, 0), (1, 1), (1, 2), (0, 0)))
    want = [[(kernel[..., None] * padded[0, i : i + 4, j : j + 4]).sum((0, 1)) for j in (0, 2, 4)] for i in (0, 2, 4)]
    np.testing.assert_allclose(blurred(x)[0], want, atol=1e-5)


def test_largest_values_of_cells_that_overlap_and_their_gradient():
    x = np.random.default_rng(0).normal(size=(1, 5, 2, 1)).astype("f4")
    rows, columns = [(0, 2), (1, 3), (2, 4), (3, 5)], [(0, 1), (0, 1), (1, 2), (1, 2)]
    want = [[x[0, a:b, c:d].max() for c, d in columns] for a, b in rows]
    np.testing.assert_array_equal(largest(x, 4)[0, ..., 0], want)
    grad = jax.grad(lambda x: largest(x, 4).sum())(x)
    np.testing.assert_array_equal(grad[0, ..., 0], sum((x[0, ..., 0] == value) for row in want for value in row))


def test_lecam_of_means_counts_a_batch_afterwards():
    loss, average = lecam_of_means(np.float32([2.0, 4.0]), np.float32([-1.0, 0.0]), np.float32([1.0, 0.5]), decay=0.9)
    np.testing.assert_allclose(loss, (3.0 - 0.5) ** 2 + (1.0 + 0.5) ** 2)
    np.testing.assert_allclose(average, [0.9 * 1 + 0.1 * 3, 0.9 * 0.5 - 0.1 * 0.5], rtol=1e-6)
