"""How well heads of continuous tokens learn known distributions: python tests/head_distributions.py

Every head is trained for a short while on tokens whose distribution depends on a label, which is all it is told. Printed is
the sliced Wasserstein distance of its samples to true ones, beside that of other true samples, which is what chance leaves.
"""

import functools
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ar_jax.generators.base import Knobs
from ar_jax.heads.diffusion import Diffusion
from ar_jax.heads.flow import Flow, Times
from ar_jax.heads.gaussian_mixture import GaussianMixture

LABELS = 2
XAR = (*np.linspace(1, 0.04, 100).tolist(), 0.0)


def moons(random, label):
    """Two half circles; each label has one of them."""
    angle = random.uniform(0, np.pi, len(label))
    sign = np.where(label == 0, 1, -1)
    points = np.stack([np.cos(angle) * sign + 0.5 * (label == 0) - 0.5, np.sin(angle) * sign - 0.25 * sign], -1)
    return points + 0.05 * random.normal(size=points.shape)


def ring(random, label):
    """Eight narrow bumps on a circle whose size depends on the label."""
    angle = random.integers(8, size=len(label)) * np.pi / 4
    radius = np.where(label == 0, 0.7, 1.4)[:, None]
    return radius * np.stack([np.cos(angle), np.sin(angle)], -1) + 0.05 * random.normal(size=(len(label), 2))


def line(random, label):
    """Three bumps of different weight and width on a line; the label mirrors it."""
    which = random.choice(3, size=len(label), p=[0.6, 0.3, 0.1])
    x = np.array([-1.0, 0.5, 1.5])[which] + np.array([0.3, 0.1, 0.2])[which] * random.normal(size=len(label))
    return (np.where(label == 0, 1, -1) * x)[:, None]


DATA = {"moons": moons, "ring": ring, "line": line}
HEADS = {
    "diffusion": Diffusion(64, 3, multiplier=1, steps="100", latest=950),
    "flow, Euler": Flow(64, 3, multiplier=1, steps=50),
    "flow, Heun": Flow(64, 3, multiplier=1, steps=20, solver="heun"),
    "flow, stochastic": Flow(64, 3, multiplier=1, steps=100, solver="stochastic", grid=Times(XAR)),
    "mixture": GaussianMixture(16),
}


class Told(nn.Module):
    """A head that is told a label."""

    head: nn.Module

    def setup(self):
        self.table = nn.Embed(LABELS, 32)
        self.mix = nn.Dense(32)

    def hidden(self, label):
        return self.mix(nn.gelu(self.table(label)))

    def loss(self, label, x, key):
        return self.head.loss(self.hidden(label), x, key=key).mean()

    def sample(self, label, keys):
        knobs = Knobs(np.ones(1, np.float32), np.ones(1, np.float32))
        return self.head.sample(self.hidden(label), keys, knobs, 0)


def true(source, seed, count):
    """Labels [1 count] and tokens [1 count c]."""
    random = np.random.default_rng(seed)
    label = np.arange(count, dtype=np.int32) % LABELS
    return label[None], source(random, label)[None].astype(np.float32)


def learned(head, source, updates, count, batch=1024, lr=3e-3):
    """Samples [count c] of a head trained on a source, for labels in turn."""
    channels = true(source, 0, 2)[1].shape[-1]
    model = Told(head.clone(channels=channels))
    labels, tokens = map(jnp.asarray, true(source, 1, 2**15))
    params = model.init(jax.random.key(0), labels[:, :2], tokens[:, :2], jax.random.key(0), method="loss")
    tx = optax.adam(optax.cosine_decay_schedule(lr, updates))

    @jax.jit
    def train(params):
        def update(carry, key):
            params, opt = carry
            pick, noise = jax.random.split(key)
            rows = jax.random.randint(pick, (batch,), 0, labels.shape[1])
            loss = lambda p: model.apply(p, labels[:, rows], tokens[:, rows], noise, method="loss")  # noqa: E731
            changes, opt = tx.update(jax.grad(loss)(params), opt, params)
            return (optax.apply_updates(params, changes), opt), None

        (params, _), _ = jax.lax.scan(update, (params, tx.init(params)), jax.random.split(jax.random.key(2), updates))
        return params

    keys = jax.random.split(jax.random.key(3), (1, count))
    draw = jax.jit(functools.partial(model.apply, method="sample"))
    return np.asarray(draw(train(params), true(source, 2, count)[0], keys))[0]


def distance(a, b, directions=64):
    """Sliced Wasserstein distance of equally many points with labels in turn, mean over labels."""
    found = []
    for label in range(LABELS):
        x, y = a[label::LABELS], b[label::LABELS]
        lines = np.random.default_rng(0).normal(size=(x.shape[1], directions))
        lines /= np.linalg.norm(lines, axis=0)
        found.append(np.abs(np.sort(x @ lines, 0) - np.sort(y @ lines, 0)).mean())
    return float(np.mean(found))


def main(updates=1500, count=4096):
    print(f"{'':18}" + "".join(f"{name:>10}" for name in DATA) + f"{'seconds':>10}")
    reals = {name: true(source, 4, count)[1][0] for name, source in DATA.items()}
    others = {name: true(source, 5, count)[1][0] for name, source in DATA.items()}
    print(f"{'other true samples':18}" + "".join(f"{distance(reals[name], others[name]):10.4f}" for name in DATA))
    for name, head in HEADS.items():
        begin = time.perf_counter()
        found = [distance(learned(head, source, updates, count), reals[data]) for data, source in DATA.items()]
        print(f"{name:18}" + "".join(f"{x:10.4f}" for x in found) + f"{time.perf_counter() - begin:10.1f}", flush=True)


if __name__ == "__main__":
    main()
