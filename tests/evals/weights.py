"""InceptionV3 with random weights under the names of the published file, and real photographs."""

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.evals.inception import InceptionV3


def random_inception(seed: int = 0) -> dict[str, np.ndarray]:
    """A state dict whose activations neither die nor explode, so that a wrong layer shows in the features."""
    rng = np.random.default_rng(seed)
    image = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)
    shapes = jax.eval_shape(InceptionV3().init, jax.random.key(0), image)["params"]
    weights = {}
    for name, layer in shapes.items():
        *size, into, out = layer["kernel"].shape
        fan = into * int(np.prod(size))
        kernel = rng.normal(0, (2 / fan) ** 0.5, (out, into, *size)).astype(np.float32)
        if name == "fc":
            weights |= {"fc.weight": kernel * 2, "fc.bias": rng.normal(size=out).astype(np.float32)}
            continue
        weights |= {
            f"{name}.conv.weight": kernel,
            f"{name}.bn.weight": rng.uniform(0.8, 1.2, out).astype(np.float32),
            f"{name}.bn.bias": rng.normal(0, 0.1, out).astype(np.float32),
            f"{name}.bn.running_mean": rng.normal(0, 0.1, out).astype(np.float32),
            f"{name}.bn.running_var": rng.uniform(0.8, 1.2, out).astype(np.float32),
            f"{name}.bn.num_batches_tracked": np.array(1),
        }
    return weights


def photographs() -> list[np.ndarray]:
    """Real photographs that scikit-image and scikit-learn ship, uint8 [h w 3]."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    return [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), *load_sample_images().images]


def crops(count: int, size: int, seed: int = 0) -> np.ndarray:
    """Random square windows of photographs, uint8 [count size size 3]."""
    rng, photos = np.random.default_rng(seed), photographs()
    found = []
    for i in range(count):
        photo = photos[i % len(photos)]
        top, left = (int(rng.integers(side - size + 1)) for side in photo.shape[:2])
        found.append(photo[top : top + size, left : left + size])
    return np.stack(found)
