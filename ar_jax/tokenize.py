"""Caches the tokens of a data set, so that a generator's training need not encode images.

    python -m ar_jax.tokenize TOKENIZER --out OUT [--name value ...]

    python -m ar_jax.tokenize runs/mnist5k_llamagen --out cache/mnist5k
    python -m ar_jax.tokenize checkpoints/vq_ds16_c2i --data.name image_folder --data.path ~/imagenet/train \\
        --crops 10 --out cache/imagenet_256
    python train.py CONFIG --generator.tokens cache/mnist5k

TOKENIZER is a run folder of train.py or a converted tokenizer. The data are those it was trained on, unless given.
--crops 10 keeps, as LlamaGen does, ten crops of every image: the corners and the middle of the image centre-cropped
to 1.1 times the size, and their mirror images. Training draws one of the versions each time it meets the image.

OUT is a folder of arrays (`ar_jax.data.arrays`): codes in the smallest type that holds them; of tokenizers that draw their
tokens the mean and log-variance in float16, of which training draws anew each time. If it is interrupted, run the same
command again: finished shards are kept, and an unfinished OUT is never read. For data with splits, write OUT/train and (with --data.split test) OUT/test.
"""

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Iterator
from concurrent import futures
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np
import tyro

from ar_jax.data import (
    Data,
    NoSplit,
    Source,
    Unreadable,
    arrays,
    centre_crop,
    flip,
    open_source,
    ten_crop,
    write_shards,
)
from ar_jax.data.packed import tokens
from ar_jax.data.records import read_json
from ar_jax.files import codec
from ar_jax.files.images import to_float
from ar_jax.files.models import Model, fingerprint, open_model
from ar_jax.files.places import path_of, reachable, resolved
from ar_jax.files.trust import taken
from ar_jax.machine import distributed
from ar_jax.machine.compiled import keep_compiled
from ar_jax.machine.distributed import Launch
from ar_jax.machine.huge_pages import use_huge_pages
from ar_jax.machine.precision import Precision, multiply_in, products
from ar_jax.machine.seeds import Seed, key_of
from ar_jax.machine.sharding import make_mesh, put_batch, replicated
from ar_jax.typing import Array, Params, PRNGKey


@dataclasses.dataclass(frozen=True)
class Options:
    """What to cache."""

    out: str
    """Folder to write, new or left by an interrupted run."""
    data: Data = Data()
    crops: Literal[1, 10] = 1
    """Crops of an image: the centre, or ten crops including mirror images."""
    scales: tuple[float, ...] = (1.1,)
    """Of ten crops: what the image is centre-cropped to before, times data.size. LlamaGen draws half of its crops from
    1.05; `--scales 1.1 1.05` keeps all twenty."""
    flip: bool = False
    """Keep the mirror image as a second version; ten crops have theirs."""
    batch: int = 64
    """Images (crops) encoded at a time by this process, over its devices; more need more memory. Changes no codes."""
    shards: int = 16
    """Number of files, and the parts of the work that are not done again after an interruption."""
    dtype: Literal["", "float32", "bfloat16"] = ""
    """Of the tokenizer's matrix products and convolutions; empty keeps the tokenizer's own."""
    seed: Seed = 0
    """For tokenizers whose tokens depend on a key and that do not say from which Gaussian they draw them."""
    precision: Precision = "highest"
    """Of products of float32 numbers (see `machine.precision`); highest gives the same codes on every device but for ties,
    default is faster on GPUs and TPUs."""
    launch: Launch = Launch()


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    prog = "python -m ar_jax.tokenize"
    if not arguments:
        raise SystemExit(__doc__)
    with distributed.command(prog):
        arguments = reachable(taken(arguments)) or ["--help"]
        if arguments[0].startswith("-"):  # --help, or an option in the place of TOKENIZER
            _parse(Data(), f"{prog} TOKENIZER", arguments)
            raise ValueError("give TOKENIZER first, a run folder of train.py or a converted tokenizer")
        model = open_model(arguments[0], "tokenizer")
        options = _parse(default_data(model), f"{prog} {arguments[0]}", arguments[1:])
        distributed.join(options.launch)
        keep_compiled()
        tokenize(model, options)


def _parse(data, prog, arguments):
    default = Options(out=tyro.MISSING, data=data)
    options = tyro.cli(Options, default=default, args=arguments, prog=prog, description=__doc__)
    codec.check(options)
    return options


def default_data(tokenizer: Model) -> Data:
    """The images a tokenizer was trained on, or of its size, without random crops."""
    known = tokenizer.settings.get("data", {"name": "image_folder"})
    return Data(**known | {"size": max(tokenizer.module.size), "crop": "centre", "flip": False, "shards": "all"})


def tokenize(tokenizer: Model, options: Options) -> None:
    """Writes the cache, or this process's shards of it.

    Raises:
      ValueError: options that do not go together, or a folder that holds something else.
    """
    _check(tokenizer, options)
    data = dataclasses.replace(options.data, unreadable="refuse")  # the others are left out here, not replaced
    source = open_source(data)
    params = tokenizer.params()
    cache = Cache(tokenizer.module, params, source, options)
    info = {
        "form": arrays.NAME, **dataclasses.asdict(source.info), "tokenizer": identity(tokenizer, params), "versions": cache.versions,
        "dtype": options.dtype, "seed": options.seed, "scales": options.scales if options.crops == 10 else (),
        "products": products(options.precision),
        "data": {name: getattr(data, name) for name in ("name", "path", "split", "size", "text", "text_rows")},
    }  # fmt: skip
    if hasattr(source, "upright"):
        info["data"]["upright"] = source.upright
    process, count = jax.process_index(), jax.process_count()
    if min(options.shards, len(source)) < count:
        raise ValueError(
            f"{count} processes cannot share {len(source)} images in {options.shards} shards; each writes shards of its "
            f"own, so give --shards at least {count}, or use fewer processes"
        )
    spec = tokenizer.module.spec
    distributed.say(
        f"{options.out}: {len(source)} images of {data.name} {data.path} ({data.split}), {cache.versions} of each, "
        f"{spec.n} tokens of {_kind(tokenizer.module)}, by {tokenizer.folder} on {jax.device_count()} "
        f"{jax.devices()[0].device_kind}"
    )
    distributed.check_shared(path_of(options.out).parent)
    if process == 0:  # claims the folder, so that the others find it begun
        write_shards(options.out, cache, info, options.shards, only=(), form=arrays.FORM)
    distributed.barrier("begun")
    mine = range(process, options.shards, count)
    complete = write_shards(options.out, cache, info, options.shards, only=mine, form=arrays.FORM)
    if cache.left_out:
        names = sorted(cache.left_out)
        print(f"left out {len(names)} that cannot be read:", *names, sep="\n  ")
    if complete:
        print(f"{options.out} is complete: {read_json(path_of(options.out) / 'info.json')['count']} records")


def _kind(module):
    spec, dtype = module.spec, kept_dtype(module)
    if spec.codes and not draws(module):
        return f"codes {' x '.join(map(str, spec.codes))} as {dtype}"
    numbers = spec.channels or len(spec.codes)
    return f"{numbers} numbers, " + ("mean and log-variance" if draws(module) else "as they are") + f" as {dtype}"


def _check(tokenizer, options):
    size, data = tokenizer.module.size, options.data
    if size != (data.size, data.size):
        raise ValueError(
            f"data.size is {data.size}, but the tokenizer takes images of {size[0]}x{size[1]}; leave it out"
        )
    if data.flip or data.crop != "centre":
        raise ValueError(
            "a cache holds fixed versions of an image; instead of data.flip or data.crop, give --flip or --crops 10"
        )
    if options.flip and options.crops == 10:
        raise ValueError("--crops 10 holds mirror images already; leave out --flip")
    if options.crops == 10 and (not options.scales or min(options.scales) < 1):
        raise ValueError(f"--scales is {options.scales}; ten crops need sizes of at least 1 times data.size")
    for name in ("batch", "shards"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} is {getattr(options, name)}; it must be at least 1")
    if data.name == "tokens":
        raise ValueError("data.name is tokens, which are encoded already; give images")


class Cache:
    """The records of a slice of the images, encoded when asked for; `versions` of each image."""

    def __init__(self, module: nn.Module, params: Params, source: Source, options: Options):
        self.source, self.options = source, options
        self.left_out: list[str] = []
        self.versions = 10 * len(options.scales) if options.crops == 10 else 1 + options.flip
        if options.dtype:
            module = module.clone(dtype=jax.numpy.dtype(options.dtype).type)
        self.field = "moments" if draws(module) else "tokens"
        # Every process encodes on its own devices: shards differ in length, so processes cannot step together.
        self.mesh = make_mesh(devices=jax.local_devices())
        self.images = max(1, options.batch // self.versions)  # of a batch, each in all versions
        self.rows = -(-self.images * self.versions // self.mesh.size) * self.mesh.size
        self.params = jax.device_put(params, replicated(self.mesh))
        self.key = key_of(options.seed)

        @jax.jit
        def encode(params, batch, key):
            return kept(module, params, batch["image"], key)

        self.encode = encode

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, rows: slice) -> Iterator[dict[str, Any]]:
        waiting = None
        for first, records in self._read(range(*rows.indices(len(self)))):
            images = np.concatenate([record.pop("image") for record in records])
            padded = np.resize(images, (self.rows, *images.shape[1:]))  # so that one program serves all batches
            batch = put_batch({"image": padded}, self.mesh)
            with multiply_in(self.options.precision):
                found = self.encode(self.params, batch, jax.random.fold_in(self.key, first))
            if waiting:  # while the devices work on this batch, the one before is written
                yield from self._records(*waiting)
            waiting = records, found
        if waiting:
            yield from self._records(*waiting)

    def _records(self, records, found):
        found = np.asarray(found)
        if not np.isfinite(found).all():
            raise ValueError(
                f"the tokenizer makes of some images numbers that are not finite as {found.dtype}; are its weights damaged?"
            )
        for i, record in enumerate(records):
            yield {self.field: found[i * self.versions : (i + 1) * self.versions], **record}

    def _read(self, todo):
        """Batches of readable records with all versions as "image" uint8 [a h w 3], and the number of the first."""
        todo = iter(todo)
        with futures.ThreadPoolExecutor(distributed.cores()) as pool:
            ahead = None  # the batch that is decoded while the one before is encoded
            for some in itertools.chain(iter(lambda: list(itertools.islice(todo, self.images)), []), [None]):
                running = some and (some[0], pool.map(self._record, some))
                if ahead:
                    records = [record for record in ahead[1] if record]
                    if records:
                        yield ahead[0], records
                ahead = running

    def _record(self, index):
        try:
            record = self.source[index]
        except Unreadable as error:
            if self.options.data.unreadable == "refuse":
                raise
            self.left_out.append(f"{error.name} ({error.reason})")
            if len(self.left_out) > self.options.data.unreadable_limit:
                raise ValueError(
                    f"{len(self.left_out)} images cannot be read, more than data.unreadable_limit="
                    f"{self.options.data.unreadable_limit}, such as {error.name}"
                ) from error
            return None
        return record | {"image": self._augmented(record["image"])}

    def _augmented(self, image):
        size = self.options.data.size
        if self.options.crops == 10:
            return np.concatenate(
                [ten_crop(centre_crop(image, int(scale * size)), size) for scale in self.options.scales]
            )
        image = centre_crop(image, size)
        return np.stack([image, flip(image)] if self.options.flip else [image])


def draws(module: nn.Module) -> bool:
    """Whether a cache keeps what tokens are drawn from, not tokens."""
    return getattr(module, "draws", False)


def kept_dtype(module: nn.Module) -> np.dtype:
    """What a cache keeps is of this type: moments float16, codes of the smallest, other tokens float32."""
    if draws(module):
        return np.dtype(np.float16)
    return np.min_scalar_type(max(module.spec.codes) - 1) if module.spec.codes else np.dtype(np.float32)


def kept(module: nn.Module, params: Params, image: Array, key: PRNGKey | None) -> Array:
    """What a cache keeps of uint8 images: `moments` [b n 2c], or tokens [b n k] or [b n c]."""
    image, method = to_float(image), "moments" if draws(module) else "encode"
    found = module.apply({"params": params}, image, method=method, **({} if draws(module) else {"key": key}))
    return found.astype(kept_dtype(module))


def identity(tokenizer: Model, params: Params) -> dict[str, Any]:
    """What makes tokens mean what they mean: the network (but not its precision), and a hash of its parameters."""
    module = codec.encode(tokenizer.module)
    module.pop("dtype", None)
    return {"folder": str(resolved(tokenizer.folder)), "module": module, "parameters": fingerprint(params)}


def check_cache(data: Data, tokenizer: Model, cache: Source | None = None) -> None:
    """Refuses tokens that another tokenizer made, or this one with other products than the rest of them.

    Args:
      data: names a cache (`data.name` is "tokens").
      tokenizer: the one that shall decode them.
      cache: of `data`, if it is open.
    Raises:
      ValueError: it is another network, or the same one with other parameters; or its folders were encoded with products
        of different precision.
    """
    ours = identity(tokenizer, tokenizer.params())
    parts = (tokens(dataclasses.replace(data, text="")) if cache is None else cache).parts
    with contextlib.suppress(NoSplit):
        parts = parts + tokens(dataclasses.replace(data, text="", split="test")).parts
    made = {part.info["products"]: part.folder for part in parts if "products" in part.info}
    if len(made) > 1:
        different = ", ".join(f"{folder} with products in {kind}" for kind, folder in made.items())
        raise ValueError(
            f"one tokenizer gives other codes in other precision: {different}. Cache them alike, with --precision highest"
        )
    for part in parts:
        made = part.info.get("tokenizer")
        if made is None:
            raise ValueError(
                f"{part.folder} does not say which tokenizer made it; write it with python -m ar_jax.tokenize"
            )
        written = codec.encode(codec.decode(made["module"], nn.Module, "module"))  # fields that came later have their defaults
        written.pop("dtype", None)
        difference = codec.difference(written, ours["module"])
        if difference or made["parameters"] != ours["parameters"]:
            raise ValueError(
                f"{part.folder} was made by another tokenizer ({made['folder']}) than {tokenizer.folder}: "
                f"{difference or 'their parameters differ'}. Cache the tokens again, or give the other tokenizer"
            )


if __name__ == "__main__":
    use_huge_pages()
    main()
