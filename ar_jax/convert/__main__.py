"""Released checkpoints to model folders, and back.

`python -m ar_jax.convert FILE --to DIR`, `python -m ar_jax.convert DIR --back FILE.safetensors`.
"""

import contextlib
import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro
from orbax.checkpoint import v1 as ocp
from tqdm import tqdm

from ar_jax.convert import next_scale
from ar_jax.convert.choose import choose, identified
from ar_jax.convert.names import to_params, to_weights
from ar_jax.convert.sources import export
from ar_jax.files.models import KINDS, Model, describe, open_model
from ar_jax.files.places import path_of, reachable, remove_tree
from ar_jax.files.trust import taken
from ar_jax.files.weights import read_weights, write_safetensors
from ar_jax.files.words import shown
from ar_jax.tokenizers.binary_autoencoder import BinaryAutoencoder
from ar_jax.tokenizers.dimensionwise import Dimensionwise
from ar_jax.train.checkpoint import save_params


def convert(
    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE|DIR")],
    *,
    to: Path | None = None,
    back: Path | None = None,
    size: int = 0,
    heads: int = 0,
    groups: int = 0,
    scales: tuple[int, ...] = (),
    levels: int = 0,
    sub_codes: int = 0,
    masks: Path | None = None,
    entry: str = "",
    family: str = "",
    average: bool = True,
) -> None:
    """Converts a released checkpoint to a model folder (--to), or a model folder to released names (--back).

    The file is recognised by its keys: .safetensors, an index of shards (.index.json), or .pt as torch.save writes it. Torch
    is not needed and nothing inside the file is executed. What does not fit a known network exactly is refused, with the
    first differing key; what training puts before names (module., _orig_mod.) is left out, and said. Parameters are kept as
    float32: files in bfloat16 or float16 are widened, which loses nothing, and come back as float32; float32 files come back
    bit for bit, float64 is narrowed.

    Examples:
      python -m ar_jax.convert vq_ds16_c2i.pt --to checkpoints/vq_ds16_c2i
      python -m ar_jax.convert vq_ds16_c2i.pt --to checkpoints/vq_ds16_c2i_384 --size 384
      python -m ar_jax.convert c2i_B_384.pt --to checkpoints/c2i_B_384
      python sample.py checkpoints/c2i_B_384 --tokenizer checkpoints/vq_ds16_c2i_384
      python -m ar_jax.convert checkpoints/c2i_B_384 --back c2i_B_384.safetensors
      python -m ar_jax.convert runs/mine/generator --back mine.safetensors

    Args:
      path: File to read; with --back a model folder, or a run folder of train.py.
      to: Folder to write, new or empty.
      back: .safetensors file to write under the original key names; it must not exist.
      size: Side of the images in pixels, which the file does not hold. 0 takes 256, 384 or 512 from a file name
        like c2i_B_384.pt; tokenizers default to 256. A generator works at one size only.
      heads: Attention heads, which the file does not hold either. 0 takes the published number for the width.
      groups: Groups of a tokenizer's norms, or of the tokens of a DetailFlow generator. 0 takes the published number.
      scales: Sides of a token pyramid, coarse to fine. Left out: the published ones of the size.
      levels: Rounds every number of a continuous tokenizer's tokens to one of so many values, which is all that TokenBridge does
        to KL-16 (64). 0 leaves them continuous.
      sub_codes: Reads the bits of a binary tokenizer's tokens as so many sub-codes, as ELM's generators do (2-10: 20 bits as 2).
        0 leaves each bit by itself, which is Binary Latent Diffusion's form.
      masks: Beside the file of an HMAR's next-scale predictor, that of its masked predictor, trained after it; one model
        of both is written.
      entry: Which weights of a file, for example ema or trainer.var; "" takes the average where its authors evaluate that (MAR,
        FlowAR, xAR), else model, module, state_dict or the top level. What is taken and what else there is, is printed.
      family: Reads the file as one of this family, for files that have the names and shapes of another: dar for D-AR's
        generators, which are LlamaGen's but for their positions.
      average: Of a run folder, take the moving average of the weights if the run keeps one.
    """
    if (to is None) == (back is None):
        raise ValueError("give either --to DIR (from a released file) or --back FILE (to one); --help shows examples")
    if to is not None:
        to_folder(
            path_of(path).expanduser(), path_of(to).expanduser(), size=size, heads=heads, groups=groups, scales=scales,
            levels=levels, sub_codes=sub_codes, masks=masks and path_of(masks).expanduser(), entry=entry, family=family,
        )  # fmt: skip
    else:
        to_file(path_of(path).expanduser(), path_of(back).expanduser(), average=average)


def to_folder(
    path: Path,
    folder: Path,
    *,
    size: int = 0,
    heads: int = 0,
    groups: int = 0,
    scales: tuple[int, ...] = (),
    levels: int = 0,
    sub_codes: int = 0,
    masks: Path | None = None,
    entry: str = "",
    family: str = "",
) -> None:
    """Writes the model folder of a released file, complete or not at all.

    Raises:
      ValueError: the file is not known, or the folder is not empty.
      FileNotFoundError: no such file.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} is already there; give another folder or remove it")
    entry, weights = choose(path, entry)
    if masks is not None:
        _, others = choose(masks, entry)
        with _of(path):
            weights = next_scale.merge(weights, others)
    hint = re.search(r"_(256|384|512)(?!\d)", path.stem)
    with _of(path):
        found, weights = identified(
            path,
            weights,
            size=size or int(hint[1] if hint else 0),
            heads=heads,
            groups=groups,
            scales=scales,
            family=family,
        )
    words, info, settings = found.source.describe(found.module)
    if levels:
        if found.kind != "tokenizer" or not found.module.spec.channels:
            raise ValueError(f"--levels is {levels}, but {path} is no continuous tokenizer: {found.kind}, {words}")
        found = found._replace(module=Dimensionwise(found.module, levels))
        words += f", each rounded to {levels} values"
    if sub_codes:
        bits = getattr(found.module, "bits", 0) if type(found.module) is BinaryAutoencoder else 0
        if not bits or sub_codes < 1 or bits % sub_codes:
            raise ValueError(
                f"--sub-codes is {sub_codes}, but {path} has no tokens of so many equal parts: {found.kind}, {words}"
            )
        found = found._replace(module=found.module.clone(parts=(bits // sub_codes,) * sub_codes))
        words += f", read as {sub_codes} sub-codes"
    print(f"{path}: {found.kind} of {found.family}, {words}; {found.trained:,} parameters in {len(weights)} entries")
    buffers = {key: weights.pop(key) for key in found.buffers if key in weights}
    origin = {"family": found.family, "file": path.name, "entry": entry, "buffers": list(buffers)}

    temporary = folder  # in a bucket nothing can be renamed, but without a model.json it is no model yet
    if isinstance(folder, Path):
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        temporary.mkdir(parents=True)
    try:
        if buffers:
            write_safetensors(temporary / "buffers.safetensors", buffers)
        with _of(path), tqdm(total=len(weights), desc="reading", unit="entry", disable=None) as progress:
            params = to_params(Widened(weights, progress), found.params, found.rules)
        del weights
        print(f"writing {folder}")
        context = ocp.Context()
        context.memory.deepcopy_host_arrays = False  # nobody changes them meanwhile
        with context:
            save_params(temporary / "params", params)
        describe(temporary, found.kind, found.module, info, {"origin": origin, **settings})
        if temporary != folder:
            os.rename(temporary, folder)
    except BaseException:
        remove_tree(temporary, ignore_errors=True)
        raise
    print(f"{folder} is complete")


@contextlib.contextmanager
def _of(path):
    """What is wrong is said of a file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class Widened(Mapping):
    """Weights as float32, read when they are asked for; float64 is narrowed."""

    def __init__(self, weights: Mapping[str, np.ndarray], progress: tqdm):
        self.weights, self.progress = weights, progress

    def __getitem__(self, key: str) -> np.ndarray:
        value = self.weights[key]
        if not (np.can_cast(value.dtype, np.float32) or value.dtype == np.float64) or value.dtype.kind in "biu":
            raise ValueError(f"{key} holds {value.dtype}, which float32 cannot keep; save the file in float32 first")
        self.progress.update()
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and that is refused
            return value.astype(np.float32, copy=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def to_file(folder: Path, path: Path, *, average: bool = True) -> None:
    """Writes the parameters of a model folder or run folder under the names of its family.

    Raises:
      ValueError: no family has such a network, the folder holds two models, or the file exists.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"--back is {path}; it must be a file named *.safetensors")
    if path.exists():
        raise ValueError(f"{path} is already there; give another name or remove it")
    model = _open(folder)
    origin = model.settings.get("origin")
    origin = origin if isinstance(origin, dict) else {}
    found = export(model.module, model.kind, origin.get("family", ""))
    print(f"{model.folder}: {found.kind} of {found.family}, {found.source.describe(found.module)[0]}")
    weights = to_weights(model.params(average=average), found.rules)
    kept = model.folder / "buffers.safetensors"
    buffers = read_weights(kept) if kept.exists() else {}
    fills = found.source.fills(found.module) if hasattr(found.source, "fills") else {}
    for key in origin.get("buffers", found.buffers):  # the original loader may insist on them
        if key not in {**buffers, **found.buffers}:
            raise ValueError(
                f"{model.folder / 'model.json'}: settings.origin.buffers has {shown(key)}, which {found.family} has not"
            )
        known = buffers if key in buffers else fills
        weights[key] = known[key] if key in known else np.zeros(found.buffers[key], np.float32)
    weights |= {key: weights[same] for key, same in getattr(found.source, "TWICE", {}).items() if key in weights}
    print(f"writing {path}: {found.trained:,} parameters")
    write_safetensors(path, weights)


def _open(folder: Path) -> Model:
    models, errors = [], []
    for kind in KINDS:
        try:
            models.append(open_model(folder, kind))
        except ValueError as error:
            errors.append(error)
    if not models:
        raise ValueError(f"{folder} holds no model: {errors[0]}")
    if len(models) > 1:
        raise ValueError(f"{folder} holds two models; give {' or '.join(str(model.folder) for model in models)}")
    return models[0]


def main(arguments: list[str] | None = None) -> None:
    prog = "python -m ar_jax.convert"
    try:
        arguments = reachable(taken(sys.argv[1:] if arguments is None else arguments))
        tyro.cli(convert, args=arguments, prog=prog, description=inspect.cleandoc(convert.__doc__.split("Args:")[0]))
    except (ValueError, OSError) as error:
        sys.exit(f"{prog}: {error}")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # nothing is computed, and accelerators may have less memory
    main()
