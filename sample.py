"""Draws images from a run of train.py or from a converted checkpoint.

    python sample.py RUN [--name value ...]

    python sample.py runs/mnist5k_llamagen                                  a grid, samples.png
    python sample.py runs/mnist5k_llamagen --labels 3 7 --count 20 --guidance 3
    python sample.py runs/emoji_llamagen --captions "red heart" "snowman"
    python sample.py checkpoints/c2i_B_256 --tokenizer checkpoints/vq_ds16_c2i --count 50000 --out b256.npz

What is written follows from --out: NAME.png is a grid, NAME.npz the uint8 array that the field's evaluators read, any
other name a folder of PNG files. Run the same command again to go on after an interruption. An image depends on the
seed and its number only, not on the batch size or the number of devices.
"""

import dataclasses
import functools
import json
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

from ar_jax import codec, distributed
from ar_jax.compiled import keep_compiled
from ar_jax.data import label_ids
from ar_jax.decode.sequential import sample_images
from ar_jax.decode.settings import Sampling, arrange, make_knobs
from ar_jax.distributed import Launch
from ar_jax.flops import with_fields
from ar_jax.images import save_png, tile, to_uint8
from ar_jax.models import Model, open_model, write_json
from ar_jax.resize import resize
from ar_jax.sharding import MeshShape, batch_sharding, make_mesh, put, shard
from ar_jax.typing import Batch


@dataclasses.dataclass(frozen=True)
class Options:
    """What to draw and where to put it."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder of train.py, or folder of a converted generator."""
    tokenizer: str = ""
    """Folder of the tokenizer, for converted generators; a run knows its own."""
    labels: tuple[str, ...] = ()
    """Classes by name or number, used in turn; all classes if left out."""
    captions: tuple[str, ...] = ()
    """Captions, used in turn."""
    features: str = ""
    """Caption features instead of captions: .npz with `features` [N rows c] and `mask` [N rows]."""
    count: int = 100
    """Number of images."""
    batch: int = 25
    """Images drawn at a time, over all devices."""
    out: str = "samples.png"
    """A .png (grid), a .npz, or a folder."""
    resize: int = 0
    """Side in pixels to resize to (bicubic, as LlamaGen's 384-pixel images are to 256); 0 keeps the model's."""
    columns: int = 0
    """Of the grid; 0 chooses."""
    seed: int = 0
    guidance: float | None = None
    """Classifier-free guidance scale; 1 is unguided, with the ramp 0. This and the next ones down to `banned`: the model's
    own if left out."""
    guidance_rule: Literal["interval", "ramp", "linear"] | None = None
    """One weight up to `guidance_last`; VAR's 1 + t, where t rises to `guidance` over the steps; or MAR's linear rise."""
    guidance_last: int | None = None
    """Last guided decode step, counted from the step after the first token; -1 guides all."""
    guidance_reach: int | None = None
    """Ramp: step at which it has risen to `guidance`; 0 is the last."""
    temperature: float | None = None
    """Divides the logits, 0 is greedy; of continuous tokens, multiplies the noise or the standard deviations."""
    top_k: int | None = None
    """Draw from the k most likely codes; 0 is off."""
    top_p: float | None = None
    """Draw from the most likely codes of this probability mass; 1 is off."""
    denoising: str | None = None
    """Steps of a head of continuous tokens, such as 100; 50-5 goes from 50 in the first decode step to 5 in the last."""
    soft: bool | None = None
    """Mixtures of codes instead of codes, as VAR's more_smooth (next-scale models)."""
    scales: str = ""
    """Scales to draw, such as 1,2,3,5,8 or 1,2x4,4x8, where pairs are height x width (FlexVAR)."""
    largest: int | None = None
    """Scales with a longer side than this are drawn greedily and, with the ramp, guided in full; 0 is none."""
    refine: str | None = None
    """Of every scale: tokens that stay as first drawn, then those drawn anew by further steps, such as "1 1,3 1,1,2,5"
    (HMAR); "" draws none anew."""
    anneal: Literal["", "constant", "linear", "cosine", "two_stage"] | None = None
    """Diffusion and flow models: how the number of inner steps falls over the decode steps (DiSA)."""
    inner_steps: int | None = None
    """Diffusion and flow models: denoising steps within the first decode step; 0 is the model's own number."""
    last_inner_steps: int | None = None
    """With `anneal`: those within the last decode step; 0 is the model's own number."""
    banned: tuple[int, ...] | None = None
    """Codes that are never drawn."""
    steps: int = 0
    """Decode steps, for models that can draw in any number of them (MAR); 0 takes the model's own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of parameters and matrix products of the generator."""
    unroll: bool = True
    """Lay the layers out one by one: faster loops on CPU, longer compilation."""
    segments: int = 1
    """Parts in which the cache grows: more read less memory and compile longer."""
    average: bool = True
    """Use the moving average of the weights, if the checkpoint has one."""
    checkpoint: str = "newest"
    """Of the generator: newest, best (of those kept with `keep_best`), or a step."""
    mesh: MeshShape = MeshShape()
    launch: Launch = Launch()


def main(arguments: list[str]) -> None:
    if not arguments:
        raise SystemExit(__doc__)
    options = tyro.cli(Options, args=arguments, prog="sample.py", description=__doc__)
    with distributed.command("sample.py"):
        distributed.join(options.launch)
        keep_compiled()
        sample(options)


def sample(options: Options) -> None:
    """Draws `options.count` images and writes them."""
    model = open_model(options.run, "generator", options.checkpoint).fixed()
    tokenizer = open_model(options.tokenizer or _own_tokenizer(model), "tokenizer")
    settings = sampling(model.settings.get("sampling", {}), options)
    generator, decoder = arrange(settings, model.module, tokenizer.module)
    makes, takes = generator.spec, decoder.spec
    if (makes.codes, makes.channels, makes.n) != (takes.codes, takes.channels, takes.n):

        def of(spec):
            return f"{spec.n} tokens " + (f"with codes {spec.codes}" if spec.codes else f"of {spec.channels} numbers")

        raise ValueError(
            f"the generator makes {of(makes)}, but the tokenizer {tokenizer.folder} has {of(takes)}; give --tokenizer"
        )
    names, conditions = condition_table(model, options)

    out, folder = Path(options.out), Path(options.out)
    if out.suffix in (".png", ".npz"):
        folder = out.with_name(f".{out.name}.parts")
    identity = {
        "run": str(model.folder.resolve()), "tokenizer": str(tokenizer.folder.resolve()), "seed": options.seed,
        "sampling": json.loads(json.dumps(dataclasses.asdict(settings))), "conditions": names, "dtype": options.dtype, "average": options.average, "resize": options.resize,
        "checkpoint": model.checkpoint, "steps": options.steps,
    }  # fmt: skip
    distributed.check_shared(folder.parent)
    todo = _missing(folder, options.count, identity)
    if len(todo):
        mesh = make_mesh(options.mesh)
        draw = make_sampler(model, tokenizer, settings, options, mesh)
        done, quiet = options.count - len(todo), jax.process_index() != 0
        with tqdm(total=options.count, initial=done, unit="image", desc=str(out), disable=quiet) as bar:
            for start in range(0, len(todo), options.batch):
                ids = todo[start : start + options.batch]
                padded = np.resize(ids, options.batch)  # the last batch too runs the one compiled program
                batch = {name: table[padded % len(names)] for name, table in conditions.items()}
                for row, image in draw(batch, padded):
                    if row < len(ids):
                        about = {"condition": names[ids[row] % len(names)], "seed": str(options.seed)}
                        save_png(_file(folder, ids[row]), image, about)
                bar.update(len(ids))
    distributed.barrier("all images are written")
    if jax.process_index() == 0:
        _assemble(folder, out, options, len(names))
    distributed.say(f"{options.count} images in {out}")


def sampling(own: dict, options: Options) -> Sampling:
    """The model's own settings, with what the command line says in their place.

    Raises:
      ValueError: something is not of its form.
    """
    chosen = {name: given for name in SETTINGS if (given := getattr(options, name, None)) is not None}
    chosen["scales"] = _scales(options.scales) if options.scales else own.get("scales", ())
    if options.refine is not None:
        try:
            chosen["refine"] = tuple(tuple(map(int, part.split(","))) for part in options.refine.split())
        except ValueError:
            raise ValueError(f"--refine is {options.refine!r}; give numbers such as '1 1,3 1,1,2,5'") from None
    unknown = own.keys() - SETTINGS
    if unknown:
        raise ValueError(f"the model's sampling settings have {sorted(unknown)}, which this version does not know")
    return Sampling(**{name: _tuples(value) for name, value in (own | chosen).items()})


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


SETTINGS = {field.name for field in dataclasses.fields(Sampling)}


def _scales(text: str) -> tuple[int | tuple[int, int], ...]:
    parts = [tuple(part.split("x")) for part in text.split(",")]
    if not all(len(part) in (1, 2) and all(side.isdecimal() and int(side) > 0 for side in part) for part in parts):
        raise ValueError(f"--scales is {text!r}; give sides such as 1,2,3,5,8, or pairs (height x width) such as 4x8")
    return tuple(int(part[0]) if len(part) == 1 else (int(part[0]), int(part[1])) for part in parts)


def make_sampler(
    model: Model, tokenizer: Model, settings: Sampling, options: Options, mesh: jax.sharding.Mesh
) -> Callable[[Batch, np.ndarray], Iterator[tuple[int, np.ndarray]]]:
    """Compiles generator and tokenizer into one program over all processes.

    It takes conditions and image numbers, the same on every process, and gives the rows of this process with their
    images, uint8 [h w 3].
    """
    share = mesh.shape["data"] * mesh.shape["fsdp"]
    if options.resize < 0:
        raise ValueError(f"--resize is {options.resize}; it must be a number of pixels, or 0 to keep the model's size")
    if options.batch < 1 or options.batch % share:
        raise ValueError(
            f"--batch is {options.batch}; it must be a positive multiple of the {share} batch shares of the mesh"
        )
    dtype = jnp.dtype(options.dtype).type
    generator, decoder = arrange(settings, model.module, tokenizer.module)
    generator = with_fields(generator, dtype=dtype)
    params, frozen = model.params(dtype=dtype, average=options.average), tokenizer.params(average=options.average)
    if options.unroll:
        generator, params = generator.unrolled(params)
    params = put(params, shard(params, mesh, generator.rules))
    frozen = put(frozen, shard(frozen, mesh, tokenizer.module.rules))
    order_fn = codec.decode(model.settings["order"])
    if options.steps:
        if not hasattr(order_fn, "steps"):
            raise ValueError(f"--steps is {options.steps}, but the order of this model leaves no choice")
        order_fn = dataclasses.replace(order_fn, steps=options.steps)

    @functools.partial(jax.jit, out_shardings=batch_sharding(mesh))
    def program(params, frozen, batch, ids):
        root, order_key = jax.random.split(jax.random.key(options.seed))
        keys = jax.vmap(lambda i: jax.random.fold_in(root, i))(ids)
        order_keys = jax.vmap(lambda i: jax.random.fold_in(order_key, i))(ids)
        order = order_fn(generator.spec, order_keys, len(ids), 0)
        knobs, guided = make_knobs(settings, order, generator.spec.scales)
        images = sample_images(
            generator,
            decoder,
            params,
            frozen,
            batch,
            order,
            knobs=knobs,
            keys=keys,
            guided=guided,
            segments=options.segments,
        )
        return to_uint8(resize(images, (options.resize,) * 2) if options.resize else images)

    def draw(batch, ids):
        batch, ids = put((batch, ids.astype(np.uint32)), batch_sharding(mesh))
        with jax.set_mesh(mesh):
            images = program(params, frozen, batch, ids)
        for part in images.addressable_shards:
            if part.replica_id == 0:  # of copies of these rows, one is written
                first = part.index[0].start or 0
                for row, image in enumerate(np.asarray(part.data), first):
                    yield row, np.broadcast_to(image, (*image.shape[:2], 3))

    return draw


def condition_table(model: Model, options: Options) -> tuple[list[str], Batch]:
    """The conditions to go through in turn: their names, and arrays whose first axis runs over them.

    Raises:
      ValueError: a label the model does not know, or the wrong kind of condition for it.
    """
    info = model.info
    if info.text_width:
        if options.labels:
            raise ValueError("--labels given, but this model takes captions; give --captions")
        if options.features:
            with np.load(options.features, allow_pickle=False) as file:
                text, mask = file["features"].astype(np.float32), file["mask"].astype(bool)
            names = [f"features {i}" for i in range(len(text))]
        elif not options.captions:
            raise ValueError("this model takes captions; give --captions or --features")
        elif info.text == "minilm":
            from ar_jax.text.minilm import encode

            names = list(options.captions)
            text, mask = encode(names, info.text_rows)
        else:
            raise ValueError(f"this model was trained on features of {info.text!r}; give them with --features")
        if text.shape[1:] != (info.text_rows, info.text_width) or mask.shape != text.shape[:2]:
            raise ValueError(
                f"--features has shapes {text.shape} and {mask.shape}; the model needs [N {info.text_rows} "
                f"{info.text_width}] and [N {info.text_rows}]"
            )
        return names, {"text": text, "text_mask": mask}
    if options.captions or options.features:
        raise ValueError("captions given, but this model takes class labels; give --labels")
    ids = label_ids(info, list(options.labels)) if options.labels else list(range(info.classes))
    names = [info.class_names[i] if info.class_names else str(i) for i in ids]
    return names, {"label": np.asarray(ids, np.int32)}


def _own_tokenizer(model):
    if "tokenizer" not in model.settings:
        raise ValueError(f"{model.folder} holds a generator only; give its tokenizer with --tokenizer FOLDER")
    return model.folder / model.settings["tokenizer"]


def _file(folder: Path, i: int) -> Path:
    return folder / f"{i:06d}.png"


def _missing(folder: Path, count: int, identity: dict) -> np.ndarray:
    """Numbers of the images still to draw, as process 0 sees them; refuses a folder begun with other settings."""
    if count < 1:
        raise ValueError(f"--count is {count}; it must be at least 1")
    missing = np.ones(count, bool)
    if jax.process_index() == 0:
        _begin(folder, identity)
        missing = np.array([not _file(folder, i).exists() for i in range(count)])
    return np.flatnonzero(distributed.agreed(missing))


def _begin(folder, identity):
    note = folder / "sampling.json"
    if note.exists():
        if json.loads(note.read_text()) != identity:
            raise ValueError(
                f"{folder} holds images of another model or other settings (see {note}); remove it or give another --out"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and was not begun by sample.py; give another --out")
    else:
        write_json(note, identity)


def _assemble(folder: Path, out: Path, options: Options, conditions: int) -> None:
    """Makes the grid or the .npz from the PNG files, under a temporary name, then removes them."""
    if out == folder:
        return
    files = [_file(folder, i) for i in range(options.count)]
    if out.suffix == ".png":
        columns = options.columns or (conditions if 1 < conditions <= 20 else 0)
        save_png(out, tile(np.stack([np.asarray(Image.open(file)) for file in files]), columns))
    else:
        first = np.asarray(Image.open(files[0]))
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(files), *first.shape)}
        temporary = out.with_name(f".{out.name}.tmp")
        try:  # one image at a time: 50,000 of them need not fit in memory
            with zipfile.ZipFile(temporary, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as array:
                np.lib.format.write_array_header_1_0(array, header)
                for file in files:
                    array.write(np.asarray(Image.open(file)).tobytes())
            temporary.replace(out)
        finally:
            temporary.unlink(missing_ok=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
