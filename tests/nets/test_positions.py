import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.nets import positions


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rotation_is_the_same_on_every_device_and_needs_no_product(dtype, monkeypatch):
    coords = np.stack(np.meshgrid([0], np.arange(5), np.arange(5)), -1).reshape(1, -1, 3)
    x = jax.random.normal(jax.random.key(0), (2, 3, 25, 8)).astype(dtype)
    table = positions.rotary(coords, 8)

    def turned(device):
        monkeypatch.setattr(positions, "platform", lambda: device)
        compiled = jax.jit(lambda x: positions.rotate(x, table)).lower(x).compile()
        return np.asarray(compiled(x).astype(jnp.float32)), compiled.as_text()

    (want, product), (got, text) = turned("tpu"), turned("gpu")
    np.testing.assert_array_equal(got, want)
    assert " dot(" in product
    assert " dot(" not in text
    np.testing.assert_allclose(np.square(got).sum(-1), np.square(np.asarray(x, np.float32)).sum(-1), rtol=2e-2)


def test_axes_of_a_grid_turn_as_rows_and_columns_do_and_channels_of_the_level_stay():
    coords = np.stack(np.meshgrid([0], np.arange(3), np.arange(5), indexing="ij"), -1).reshape(-1, 3)
    found, rest = positions.rotary_axes(coords, (4, 8, 8)), np.array([1, 0])[:, None, None, None]
    np.testing.assert_array_equal(found[..., :4], np.broadcast_to(rest, (2, 1, 15, 4)))
    np.testing.assert_allclose(found[..., 4:], positions.rotary(coords[None], 16), atol=1e-6)
