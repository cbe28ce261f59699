"""Draws images from a run of train.py or from a converted checkpoint.

    python sample.py RUN [--name value ...]

    python sample.py runs/mnist5k_llamagen                                  a grid, samples.png
    python sample.py runs/mnist5k_llamagen --labels 3 7 --count 20 --guidance 3
    python sample.py runs/emoji_llamagen --captions "red heart" "snowman"
    python sample.py runs/mnist5k_var --edit digit.png --mask hole.png      what is white in hole.png is drawn anew
    python sample.py runs/mnist5k_var --preview 8 --out steps.png           an image after 1, 2, 4, ... steps, side by side
    python sample.py checkpoints/c2i_B_256 --tokenizer checkpoints/vq_ds16_c2i --count 50000 --out b256.npz

What is written follows from --out: NAME.png (.jpg, .webp) is a grid, NAME.npz the uint8 array that the field's evaluators read, any
other name a folder of PNG files. Run the same command again to go on after an interruption. An image depends on the
seed and its number only, not on the batch size or the number of devices.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Annotated

import flax.linen as nn
import jax
import numpy as np
import tyro
from PIL import Image, ImageOps
from tqdm import tqdm

from ar_jax.data.base import needed
from ar_jax.data.folder import SUFFIXES
from ar_jax.data.images import read_image
from ar_jax.decode.sampling import read_sampling
from ar_jax.files import codec
from ar_jax.files.images import PICTURES, save_picture, tile
from ar_jax.files.models import image_shape, write_json
from ar_jax.files.places import made, path_of, reachable, remove_tree, resolved, seekable
from ar_jax.files.trust import taken
from ar_jax.machine import distributed
from ar_jax.machine.compiled import keep_compiled
from ar_jax.machine.distributed import Launch
from ar_jax.machine.huge_pages import use_huge_pages
from ar_jax.machine.sharding import MeshShape, make_mesh
from ar_jax.options import Sampler, options_of
from ar_jax.sampler import Given, condition_table, in_batches, open_drawer
from ar_jax.typing import Within


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Sampler):
    """What to draw and where to put it."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder of train.py, or folder of a converted generator."""
    labels: tuple[str, ...] = ()
    """Classes by name or number, used in turn; all classes if left out."""
    count: Annotated[int, Within(1, 2**24)] | None = None
    """Number of images; left out, 100, or one with --preview."""
    out: str = "samples.png"
    """A grid (.png, .jpg, .webp), a .npz, or a folder of PNG files."""
    columns: int = 0
    """Of the grid; 0 chooses."""
    preview: Annotated[int, Within(0, 64)] = 0
    """Each image in the making, as a strip of at most so many pictures: after every step of its order (a token, a scale, a set
    of tokens) or after 1, 2, 4, ... of them, and at the end. What the tokens so far say is shown as the tokenizer tells it: of
    scales, the sum so far; of tokens of falling importance, the image they stand for; else the cells of known tokens, and grey in
    place of the others. 0 draws images alone."""
    edit: str = ""
    """An image file to edit, cropped to the proportions of the model's images and resized to them."""
    mask: str = ""
    """With --edit: an image file of the same size, white where pixels are drawn, black where they are kept."""
    at: tuple[int, int] | None = None
    """With --edit: row and column of the model's images at which this one lies, not resized; what it leaves is drawn."""
    keep_scales: int = 0
    """With --edit: the first so many scales are the image's, only finer ones are drawn (next-scale models)."""
    paste: bool = True
    """With --edit: kept pixels are the image's own; --no-paste shows what the tokenizer makes of them, without a seam."""
    mesh: MeshShape = MeshShape()
    launch: Launch = Launch()


def main(arguments: list[str]) -> None:
    if not arguments:
        raise SystemExit(__doc__)
    with distributed.command("sample.py"):
        own, arguments = options_of(reachable(taken(arguments)))
        default = Options(run=tyro.MISSING, sampling=own.sampling, fields=own.fields)
        options = tyro.cli(
            Options, args=arguments, default=default, prog="sample.py", description=__doc__,
            config=(tyro.conf.AvoidSubcommands,),
        )  # fmt: skip
        codec.check(options)
        distributed.join(options.launch)
        keep_compiled()
        sample(options)


def sample(options: Options) -> None:
    """Draws `options.count` images and writes them."""
    if options.count is None:
        options = dataclasses.replace(options, count=1 if options.preview else 100)
    if options.preview and not options.columns:
        options = dataclasses.replace(options, columns=1)
    drawer = open_drawer(options.run, options)
    names, conditions = condition_table(drawer.model.info, options, options.labels)
    given = read_edit(options, drawer.decoder)

    out = folder = path_of(options.out)
    kind = out.suffix.lower()
    if kind in (".npy", ".zip", *SUFFIXES) and kind not in PICTURES:
        raise ValueError(
            f"--out is {options.out}; it must be a grid ({', '.join(PICTURES)}), a .npz, or a folder of PNG files"
        )
    if kind in (".npz", *PICTURES):
        folder = out.with_name(f".{out.name}.parts")
    identity = {
        "run": str(resolved(drawer.model.folder)), "tokenizer": str(resolved(drawer.tokenizer.folder)), "seed": options.seed,
        "sampling": codec.encode(drawer.sampling), "conditions": names, **options.numerics, "average": options.average, "resize": options.resize,
        "checkpoint": drawer.model.checkpoint,
    }  # fmt: skip
    if options.preview:
        identity["preview"] = options.preview
    if given:
        identity["edit"] = {
            "sha256": [hashlib.sha256(array.tobytes()).hexdigest() for array in (given.image, given.free)],
            "keep_scales": given.scales, "paste": given.paste,
        }  # fmt: skip
    distributed.check_shared(folder.parent)
    todo = _missing(folder, options.count, identity)
    if len(todo):
        mesh = make_mesh(options.mesh)
        draw = drawer.compile(mesh, given, options.preview)
        done, quiet, calls = options.count - len(todo), jax.process_index() != 0, collections.Counter()
        begin = True
        with (
            tqdm(total=options.count, initial=done, unit="image", desc=str(out), disable=quiet) as bar,
            Writers(distributed.cores()) as writers,
        ):
            for ids, drawn in in_batches(draw, conditions, todo, options.batch):
                writers.wait()
                if begin:  # before anything is written, the model has shown that it draws
                    _begin(folder, identity)
                    begin = False
                for one in drawn:
                    calls += collections.Counter({"images": 1, **one.calls})
                if out == folder:
                    for row, image, called, _ in drawn:
                        about = {"condition": names[ids[row] % len(names)], "seed": str(options.seed)}
                        writers.begin(
                            save_picture, _file(folder, ids[row]), image, about | {"calls": json.dumps(called)}
                        )
                elif drawn:
                    writers.begin(_save_shard, folder, ids[[one.row for one in drawn]], [one.image for one in drawn])
                bar.update(len(ids))
            writers.wait()
        many = calls.pop("images", 1)  # a process that holds copies only has written none
        said = ", ".join(f"{count / many:.4g} of the {name}" for name, count in calls.items())
        distributed.say(f"calls an image: {said}")
    distributed.barrier("all images are written")
    if jax.process_index() == 0:
        _assemble(folder, out, options, len(names))
    distributed.say(f"{options.count} images in {out}")


class Writers:
    """Threads that write what was drawn while the devices draw on."""

    def __init__(self, threads: int):
        self._pool, self._begun = futures.ThreadPoolExecutor(threads), []

    def __enter__(self) -> "Writers":
        return self

    def __exit__(self, *error: object) -> None:
        # After an error what has begun is written whole, and the rest is not begun
        self._pool.shutdown(cancel_futures=True)

    def begin(self, function: Callable, *arguments: object) -> None:
        self._begun.append(self._pool.submit(function, *arguments))

    def wait(self) -> None:
        """Until all is written; raises what a thread raised."""
        for one in self._begun:
            one.result()
        self._begun.clear()


def read_edit(options: Options, tokenizer: nn.Module) -> Given | None:
    """The image to edit and what is kept of it.

    Raises:
      ValueError: options that do not fit together or the model, no such image, or a mask that does not fit it.
    """
    if not options.edit:
        if options.mask or options.at or options.keep_scales:
            raise ValueError("--mask, --at and --keep-scales speak of an image; give it with --edit FILE")
        return None
    height, width, channels = image_shape(tokenizer)
    scales = len(tokenizer.spec.scales)
    if not 0 <= options.keep_scales < scales:
        raise ValueError(
            f"--keep-scales is {options.keep_scales}; the model has {scales}, so it must be 0 to {scales - 1}"
        )
    if not (options.mask or options.at or options.keep_scales):
        raise ValueError("--edit needs to know what to draw: give --mask FILE, --at ROW COLUMN, or --keep-scales N")
    with needed():
        image, mask = read_image(options.edit), read_image(options.mask).convert("L") if options.mask else None
    free = np.zeros((image.height, image.width), bool)
    if mask is not None:
        if mask.size != image.size:
            raise ValueError(
                f"--mask {options.mask} has {mask.width}x{mask.height} pixels, but {options.edit} has "
                f"{image.width}x{image.height}; they must be of one size"
            )
        free = np.asarray(mask) >= 128
    if options.at:
        (top, left), low, right = options.at, options.at[0] + image.height, options.at[1] + image.width
        if min(top, left) < 0 or low > height or right > width:
            raise ValueError(
                f"--at is {top} {left}, but an image of {image.width}x{image.height} pixels there leaves the model's "
                f"{width}x{height}"
            )
        pixels, part = np.full((height, width, 3), 128, np.uint8), free
        free = np.ones((height, width), bool)
        pixels[top:low, left:right], free[top:low, left:right] = image, part
    else:
        pixels = np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC))
        fitted = ImageOps.fit(Image.fromarray(free.astype(np.uint8) * 255), (width, height), Image.Resampling.BOX)
        free = np.asarray(fitted) > 0
        if not options.mask:
            free = np.ones_like(free)
    if not free.any():
        raise ValueError(f"--mask {options.mask} is black everywhere: nothing is left to draw")
    pixels = pixels if channels == 3 else pixels.mean(-1, keepdims=True).astype(np.uint8)
    return Given(pixels, free, options.keep_scales, options.paste)


def _file(folder: Path, i: int) -> Path:
    return folder / f"{i:06d}.png"


def _save_shard(folder: Path, ids: np.ndarray, images: list[np.ndarray]) -> None:
    """Writes numbered images as one .npz, all of it or nothing."""
    with made(folder / f"{ids[0]:06d}.npz") as part, open(part, "wb") as file:
        np.savez(file, ids=ids, images=np.stack(images))


def _kept(folder: Path) -> dict[int, tuple[Path, int]]:
    """The file that holds each image, and its place there."""
    found = {}
    for file in folder.iterdir() if folder.exists() else ():
        if not file.stem.isdecimal():
            continue
        if file.suffix == ".png":  # a folder of images, or an .npz begun by an earlier version
            found[int(file.stem)] = file, 0
        elif file.suffix == ".npz":
            found |= {int(i): (file, row) for row, i in enumerate(_read_shard(file, "ids"))}
    return found


def _read_shard(file: Path, name: str) -> np.ndarray:
    try:
        with np.load(seekable(file), allow_pickle=False) as shard:
            return shard[name]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} cannot be read ({error}); remove it and run the same command again") from error


def _images(folder: Path, count: int) -> Iterator[np.ndarray]:
    """The images of a folder in their order, uint8 [h w 3]."""
    kept, shard = _kept(folder), (None, None)
    if missing := [i for i in range(count) if i not in kept]:
        raise ValueError(f"{folder} lacks {len(missing)} images, such as {missing[0]}; run the same command again")
    for file, row in (kept[i] for i in range(count)):
        if file.suffix == ".png":
            yield np.asarray(Image.open(seekable(file)))
            continue
        if shard[0] != file:
            shard = file, _read_shard(file, "images")
        yield shard[1][row]


def _missing(folder: Path, count: int, identity: dict) -> np.ndarray:
    """Numbers of the images still to draw, as process 0 sees them; refuses a folder begun with other settings.

    Nothing is written.
    """
    if count < 1:
        raise ValueError(f"--count is {count}; it must be at least 1")
    missing = np.ones(count, bool)
    if jax.process_index() == 0:
        _check(folder, identity)
        missing[[i for i in _kept(folder) if i < count]] = False
    return np.flatnonzero(distributed.agreed(missing))


def _begin(folder, identity):
    """Notes what the images of a folder are of; the processes go on together."""
    if not (folder / "sampling.json").exists():
        write_json(folder / "sampling.json", identity)
    distributed.barrier("the folder is begun")


def _check(folder, identity):
    note = folder / "sampling.json"
    if note.exists():
        if _as_now(json.loads(note.read_text())) != identity:
            raise ValueError(
                f"{folder} holds images of another model or other settings (see {note}); remove it or give another --out"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and was not begun by sample.py; give another --out")


def _as_now(note: dict) -> dict:
    """The note of an earlier version, which kept a flat list of settings, in the form of this one."""
    if "type" in note.get("sampling", {}):
        return note
    steps = note.pop("steps", 0)
    sampling = read_sampling(note["sampling"])
    if steps:
        sampling = dataclasses.replace(sampling, fields=(*sampling.fields, ("order.steps", steps)))
    return note | {"sampling": codec.encode(sampling)}


def _assemble(folder: Path, out: Path, options: Options, conditions: int) -> None:
    """Makes the grid or the .npz, all of it or nothing, then removes what it was made of."""
    if out == folder:
        return
    images = _images(folder, options.count)
    if out.suffix.lower() in PICTURES:
        columns = options.columns or (conditions if 1 < conditions <= 20 else 0)
        save_picture(out, tile(np.stack(list(images)), columns))
    else:
        first = next(images)
        header = {"descr": "|u1", "fortran_order": False, "shape": (options.count, *first.shape)}
        with (  # a shard at a time: 50,000 images need not fit in memory
            made(out) as part,
            zipfile.ZipFile(part, "w") as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as array,
        ):
            np.lib.format.write_array_header_1_0(array, header)
            for image in itertools.chain([first], images):
                array.write(image.tobytes())
    remove_tree(folder)


if __name__ == "__main__":
    use_huge_pages()
    main(sys.argv[1:])
