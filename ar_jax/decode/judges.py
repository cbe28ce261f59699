"""Judges of images in the making, for decoders that search (`decode.search`); and a small one of the classes of a data set.

    python -m ar_jax.decode.judges --out judge.safetensors --data.name mnist5k --data.size 32

A judge is a frozen dataclass with

    open() -> parameters                              read once, and arguments of the compiled program
    judge(parameters, images, batch) -> scores [b q]  higher is better: float32 images [b q h w c] in about [-1, 1], q candidates
                                                      for each of b conditions
    needs                                             what it reads of the batch, such as ("label",); may be left out

Search is won by whoever flatters its judge, so figures of what was found are to come from another one.
"""

import dataclasses
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from ar_jax.files.places import made, path_of
from ar_jax.files.weights import read_weights
from ar_jax.nets.resize import resize
from ar_jax.typing import Array, Batch, Float, Params


@dataclasses.dataclass(frozen=True)
class SmallNetwork:
    """The classifier of `evals.classifier`, from the file that this module's command writes; gives maps [b 1 1 classes]."""

    path: str = ""
    """Of the file."""

    def open(self) -> Params:
        if not path_of(self.path).is_file():
            raise ValueError(
                f"decoder.judge.network.path is {self.path!r}, which is no file; python -m ar_jax.decode.judges writes one"
            )
        flat = read_weights(self.path)
        return jax.tree.map(
            jnp.asarray, {name: dict(_inside(flat, name)) for name in {key.split("/")[0] for key in flat}}
        )

    def __call__(self, params: Params, image: Float[Array, "b h w c"]) -> Float[Array, "b 1 1 k"]:
        from ar_jax.evals.classifier import SmallNet

        classes = params["Dense_1"]["bias"].shape[0]
        side = round((params["Dense_0"]["kernel"].shape[0] / params["Conv_2"]["bias"].shape[0]) ** 0.5) * 8
        image = jnp.broadcast_to(image, (*image.shape[:3], 3))
        image = image if image.shape[1:3] == (side, side) else resize(image, (side, side))
        return SmallNet(classes, parent=None).apply({"params": params}, jnp.clip(image, -1, 1))[:, None, None]


def _inside(flat, name):
    return ((key.partition("/")[2], value) for key, value in flat.items() if key.startswith(f"{name}/"))


@dataclasses.dataclass(frozen=True)
class ByClass:
    """How probable a network finds the class that was asked for: its log-probability.

    The network is called as teachers are (`train.teachers`); its maps, averaged over their places, are logits of the classes.
    A program of your own is `train.exported.Exported`.
    """

    network: Callable = SmallNetwork()
    """With `open() -> parameters`, called with them and images [b h w c]."""

    needs = ("label",)

    def open(self) -> Params:
        return self.network.open()

    def __call__(self, params: Params, images: Float[Array, "b q h w c"], batch: Batch) -> Float[Array, "b q"]:
        if "label" not in batch:
            raise ValueError("decoder.judge ByClass judges classes, but this model is not asked for one")
        logits = self.network(params, images.reshape(-1, *images.shape[2:])).mean((1, 2))
        chance = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(*images.shape[:2], -1)
        return jnp.take_along_axis(chance, jnp.asarray(batch["label"])[:, None, None], axis=-1)[..., 0]


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Several judges: by the ranks that they give the candidates, or by their scores scaled to 0..1 (`by_rank`, `by_score`).

    Source: SoTo, as in "(1D) Ordered Tokens Enable Efficient Test-Time Search".
    """

    judges: tuple[Callable, ...] = ()
    weights: tuple[float, ...] = ()
    """Of each; () is 1."""
    ranks: bool = True

    def __post_init__(self):
        if not self.judges or len(self.weights) not in (0, len(self.judges)):
            raise ValueError(
                f"decoder.judge has {len(self.judges)} judges and {len(self.weights)} weights; give a weight to each, or none"
            )

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(name for judge in self.judges for name in getattr(judge, "needs", ()))

    def open(self) -> tuple[Params, ...]:
        return tuple(judge.open() for judge in self.judges)

    def __call__(self, params: tuple, images: Float[Array, "b q h w c"], batch: Batch) -> Float[Array, "b q"]:
        scores = jnp.stack([judge(one, images, batch) for judge, one in zip(self.judges, params)])
        rule = by_rank if self.ranks else by_score
        return rule(scores, np.float32(self.weights or (1,) * len(self.judges)))


def by_rank(scores: Float[Array, "v *b q"], weights: Float[Array, "v"]) -> Float[Array, "*b q"]:
    """1 - sum w rank / (sum w (q - 1)): rank 0 is the best of the last axis."""
    ranks = jnp.argsort(jnp.argsort(-scores, axis=-1), axis=-1).astype(jnp.float32)
    worst = weights.sum() * max(scores.shape[-1] - 1, 1)
    return 1 - jnp.tensordot(weights, ranks, 1) / worst


def by_score(scores: Float[Array, "v *b q"], weights: Float[Array, "v"]) -> Float[Array, "*b q"]:
    """sum w (score - least) / (largest - least), 0 where all are the same."""
    least, span = scores.min(-1, keepdims=True), jnp.ptp(scores, axis=-1, keepdims=True)
    return jnp.tensordot(weights, jnp.where(span < 1e-8, 0, (scores - least) / jnp.maximum(span, 1e-8)), 1)


def main(arguments: list[str]) -> None:
    from safetensors.numpy import save_file

    from ar_jax.data import Data
    from ar_jax.evals.classifier import train_classifier

    @dataclasses.dataclass(frozen=True)
    class Options:
        """What to learn from, and where the classifier goes."""

        out: str
        """File to write, .safetensors."""
        data: Data = Data()
        epochs: int = 8

    prog = "python -m ar_jax.decode.judges"
    options = tyro.cli(Options, args=arguments or ["--help"], prog=prog, description=__doc__)
    out = path_of(options.out)
    if out.suffix != ".safetensors":
        raise SystemExit(f"{prog}: --out is {options.out}; it must be a .safetensors file")
    trained = train_classifier(options.data, epochs=options.epochs)
    flat = {f"{layer}/{leaf}": np.asarray(x) for layer, tree in trained.params.items() for leaf, x in tree.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with made(out) as part:
        save_file(flat, part)
    print(f"{out}: right on {trained.accuracy:.1%} of held-out images")


if __name__ == "__main__":
    main(sys.argv[1:])
