"""From a model folder to images: what `sample.py` and `ar_jax.evaluate` share."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.data import label_ids
from ar_jax.decode.edit import Edit, free_slots
from ar_jax.decode.sequential import sample_images
from ar_jax.decode.settings import Sampling, arrange, make_knobs, read_settings
from ar_jax.files.images import to_float, to_uint8
from ar_jax.files.models import Model, open_model
from ar_jax.machine.flops import with_fields
from ar_jax.machine.sharding import batch_sharding, put, shard
from ar_jax.nets.resize import resize
from ar_jax.orders import in_steps, known_first
from ar_jax.typing import Batch

Draw = Callable[[Batch, np.ndarray], Iterator[tuple[int, np.ndarray]]]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How images are drawn from a model folder."""

    tokenizer: str = ""
    """Folder of the tokenizer, for converted generators; a run knows its own."""
    captions: tuple[str, ...] = ()
    """Captions, used in turn."""
    features: str = ""
    """Caption features instead of captions: .npz with `features` [N rows c] and `mask` [N rows]."""
    batch: int = 25
    """Images drawn at a time, over all devices."""
    resize: int = 0
    """Side in pixels to resize to (bicubic, as LlamaGen's 384-pixel images are to 256); 0 keeps the model's."""
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
    unroll: bool | None = None
    """Lay the layers out one by one: faster loops on CPU, longer compilation. Left out: if a step reveals one token."""
    segments: int = 1
    """Parts in which the cache grows: more read less memory and compile longer."""
    average: bool = True
    """Use the moving average of the weights, if the checkpoint has one."""
    checkpoint: str = "newest"
    """Of the generator: newest, best (of those kept with `keep_best`), or a step."""


class Given(NamedTuple):
    """A part of an image to be kept.

    Attributes:
      image: uint8 [H W c], as the tokenizer makes them.
      free: bool [H W], pixels that are drawn.
      scales: of the tokenizer's scales the first so many are kept whole.
      paste: kept pixels are the image's own, not the tokenizer's.
    """

    image: np.ndarray
    free: np.ndarray
    scales: int = 0
    paste: bool = True


class Drawer(NamedTuple):
    """A generator and a tokenizer ready to draw.

    Attributes:
      model, tokenizer: their folders.
      generator, decoder: the networks, arranged for the settings.
      settings: the model's own, with what was asked for in their place.
      options: as asked for.
    """

    model: Model
    tokenizer: Model
    generator: nn.Module
    decoder: nn.Module
    settings: Sampling
    options: Sampler

    def compile(self, mesh: jax.sharding.Mesh, given: Given | None = None) -> Draw:
        """Reads the parameters and makes one program over all processes.

        It takes conditions and image numbers, the same on every process, and gives the rows of this process with their
        images, uint8 [h w 3]. Images that are not finite raise ValueError.
        """
        options, settings, decoder = self.options, self.settings, self.decoder
        share = mesh.shape["data"] * mesh.shape["fsdp"]
        if options.resize < 0:
            raise ValueError(
                f"--resize is {options.resize}; it must be a number of pixels, or 0 to keep the model's size"
            )
        if options.batch < 1 or options.batch % share:
            raise ValueError(
                f"--batch is {options.batch}; it must be a positive multiple of the {share} batch shares of the mesh"
            )
        dtype = jnp.dtype(options.dtype).type
        generator = with_fields(self.generator, dtype=dtype)
        params = self.model.params(dtype=dtype, average=options.average)
        frozen = self.tokenizer.params(average=options.average)
        order_fn = in_steps(self.model.order, options.steps)
        by_token = set(order_fn(generator.spec, jax.random.split(jax.random.key(0), 1), 1, 0).sizes) == {1}
        if by_token if options.unroll is None else options.unroll:
            generator, params = generator.unrolled(params)
        params = put(params, shard(params, mesh, generator.rules))
        frozen = put(frozen, shard(frozen, mesh, decoder.rules))

        known = np.zeros(decoder.spec.n, bool)
        if given is not None and generator.any_order:
            known = np.asarray(~free_slots(decoder.spec, given.free[None])[0])

        @functools.partial(jax.jit, out_shardings=batch_sharding(mesh))
        def program(params, frozen, batch, ids, pixels):
            root, order_key = jax.random.split(jax.random.key(options.seed))
            keys = jax.vmap(lambda i: jax.random.fold_in(root, i))(ids)
            order_keys = jax.vmap(lambda i: jax.random.fold_in(order_key, i))(ids)
            order, edit = order_fn(generator.spec, order_keys, len(ids), 0), None
            if given is not None:
                if generator.any_order:
                    order = known_first(order_fn, generator.spec, known, order_keys)
                image, free = (jnp.broadcast_to(x, (len(ids), *x.shape)) for x in pixels)
                edit = Edit(to_float(image), free, given.scales, int(known.sum()))
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
                edit=edit,
            )
            if given is not None and given.paste:
                images = jnp.where(edit.free[..., None], images, edit.image)
            finite = jnp.isfinite(images).all((1, 2, 3))
            return to_uint8(resize(images, (options.resize,) * 2) if options.resize else images), finite

        def draw(batch, ids):
            batch, ids = put((batch, ids.astype(np.uint32)), batch_sharding(mesh))
            with jax.set_mesh(mesh):
                images, finite = program(params, frozen, batch, ids, given and (given.image, given.free))
            for part, sound in zip(images.addressable_shards, finite.addressable_shards):
                if part.replica_id == 0:  # of copies of these rows, one is written
                    first = part.index[0].start or 0
                    if not np.asarray(sound.data).all():
                        raise ValueError(
                            f"images drawn from {self.model.folder} hold NaN or infinity; are its weights or those of "
                            f"{self.tokenizer.folder} damaged, or too large for {options.dtype}?"
                        )
                    for row, image in enumerate(np.asarray(part.data), first):
                        yield row, np.broadcast_to(image, (*image.shape[:2], 3))

        return draw


def open_drawer(run: str, options: Sampler) -> Drawer:
    """The generator of a folder and its tokenizer.

    Raises:
      ValueError: no such models, or they do not fit each other or the options.
    """
    model = open_model(run, "generator", options.checkpoint).fixed()
    own = model.settings.get("tokenizer")
    if not (options.tokenizer or own):
        raise ValueError(f"{model.folder} holds a generator only; give its tokenizer with --tokenizer FOLDER")
    tokenizer = open_model(options.tokenizer or model.folder / own, "tokenizer")
    settings = sampling(model.settings.get("sampling", {}), options)
    generator, decoder = arrange(settings, model.module, tokenizer.module)
    makes, takes = generator.spec, decoder.spec
    if (makes.codes, makes.channels, makes.n) != (takes.codes, takes.channels, takes.n):

        def of(spec):
            return f"{spec.n} tokens " + (f"with codes {spec.codes}" if spec.codes else f"of {spec.channels} numbers")

        raise ValueError(
            f"the generator makes {of(makes)}, but the tokenizer {tokenizer.folder} has {of(takes)}; give --tokenizer"
        )
    return Drawer(model, tokenizer, generator, decoder, settings, options)


def sampling(own: dict, options: Sampler) -> Sampling:
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
    return read_settings(own | chosen)


SETTINGS = {field.name for field in dataclasses.fields(Sampling)}


def _scales(text: str) -> tuple[int | tuple[int, int], ...]:
    parts = [tuple(part.split("x")) for part in text.split(",")]
    if not all(len(part) in (1, 2) and all(side.isdecimal() and int(side) > 0 for side in part) for part in parts):
        raise ValueError(f"--scales is {text!r}; give sides such as 1,2,3,5,8, or pairs (height x width) such as 4x8")
    return tuple(int(part[0]) if len(part) == 1 else (int(part[0]), int(part[1])) for part in parts)


def condition_table(model: Model, options: Sampler, labels: tuple[str, ...] = ()) -> tuple[list[str], Batch]:
    """The conditions to go through in turn: their names, and arrays whose first axis runs over them.

    Raises:
      ValueError: a label the model does not know, or the wrong kind of condition for it.
    """
    info = model.info
    if info.text_width:
        if labels:
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
    ids = label_ids(info, list(labels)) if labels else list(range(info.classes))
    names = [info.class_names[i] if info.class_names else str(i) for i in ids]
    return names, {"label": np.asarray(ids, np.int32)}
