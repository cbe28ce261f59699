"""From a model folder to images: what `sample.py`, `ar_jax.evaluate` and Python share."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.data import Info, label_ids
from ar_jax.decode.edit import Edit, free_slots
from ar_jax.decode.sampling import Sampling
from ar_jax.files import codec
from ar_jax.files.images import to_float, to_uint8
from ar_jax.files.models import Model, blamed, fingerprint
from ar_jax.files.places import path_of, seekable
from ar_jax.machine.flops import with_fields
from ar_jax.machine.precision import multiply_in
from ar_jax.machine.seeds import key_of
from ar_jax.machine.sharding import batch_sharding, put, whole
from ar_jax.nets.resize import resize
from ar_jax.options import Sampler, changes, open_models, own_sampling
from ar_jax.orders import Order, OrderFn, known_first
from ar_jax.tokenizers.host import on_host
from ar_jax.typing import Array, Batch, Int, Key, PRNGKey, UInt8


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


class Drawn(NamedTuple):
    """An image.

    Attributes:
      row: its place in the batch.
      image: uint8 [h w 3].
      calls: how often each network was called for it.
      accepted: tokens accepted at each call of the generator, int [c].
    """

    row: int
    image: np.ndarray
    calls: dict[str, int]
    accepted: np.ndarray


Draw = Callable[[Batch, np.ndarray], Iterator[Drawn]]


class Drawer(NamedTuple):
    """A generator and a tokenizer ready to draw.

    Attributes:
      model, tokenizer: their folders.
      generator, decoder, order: the networks and the order, with what sampling changes of them.
      sampling: the model's own, or what was asked for.
      options: as asked for.
    """

    model: Model
    tokenizer: Model
    generator: nn.Module
    decoder: nn.Module
    order: OrderFn
    sampling: Sampling
    options: Sampler

    def compile(self, mesh: jax.sharding.Mesh, given: Given | None = None, preview: int = 0) -> Draw:
        """Reads the parameters and makes one program over all processes.

        Args:
          preview: at most so many pictures of every image in the making, side by side; 0 is the image alone.

        It takes conditions and image numbers, the same on every process, and gives the images of this process's rows. The
        devices begin at once; whoever asks for the images waits. Images that are not finite raise ValueError.
        """
        options, sampling, decoder, order_fn = self.options, self.sampling, self.decoder, self.order
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
        shown_in = None if options.pixels == "own" else jnp.dtype(options.pixels).type
        generator = with_fields(self.generator, dtype=dtype)
        with blamed(self.model):
            unroll = by_token(generator, order_fn) if options.unroll is None else options.unroll
        params = self.model.params(dtype, options.average, mesh, unroll)
        frozen = self.tokenizer.params(average=options.average, mesh=mesh)
        extra = jax.device_put(sampling.weights(), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        was = self.model.settings.get("trained_on")
        if was and options.average and not options.tokenizer and fingerprint(whole(frozen, mesh)) != was:
            raise ValueError(
                f"{self.model.folder} is trained for a tokenizer with other parameters than {self.tokenizer.folder} has now: "
                f"train it on, or draw nevertheless with --tokenizer {self.tokenizer.folder}"
            )
        generator = generator.by_layer() if unroll else generator

        known, here = known_beforehand(generator, given), on_host(decoder)
        if preview and here:
            raise ValueError(
                f"--preview is {preview}, but {self.tokenizer.folder} decodes whole images, outside the program that draws them"
            )

        def finished(images, pixels):
            if preview:
                shown, finite = jax.vmap(lambda images: finished_one(images, pixels), 1, 1)(images)
                return side_by_side(shown), finite.all(1)
            return finished_one(images, pixels)

        def finished_one(images, pixels):
            if given is not None and given.paste:
                image, free = pixels
                images = jnp.where(free[..., None], images, to_float(image[None]))
            finite = jnp.isfinite(images).all((1, 2, 3))
            return to_uint8(resize(images, (options.resize,) * 2) if options.resize else images), finite

        @functools.partial(jax.jit, out_shardings=batch_sharding(mesh))
        def program(params, frozen, batch, ids, pixels, extra):
            keys, order_keys = image_keys(options.seed, ids)
            order, edit = arranged(generator, order_fn, order_keys, pixels, given.scales if given else 0, known)
            drawn, account = sampling.images(
                generator, decoder, params, frozen, batch, order,
                keys=keys, edit=edit, pixels=shown_in, decoded=not here, preview=preview,
                extra=extra,
            )  # fmt: skip
            return drawn if here else finished(drawn, pixels), account

        def draw(batch, ids):
            batch, ids = put((batch, ids.astype(np.uint32)), batch_sharding(mesh))
            arguments = params, frozen, batch, ids, given and (given.image, given.free), extra
            with jax.set_mesh(mesh), multiply_in(options.precision):
                with blamed(self.model, self.tokenizer):
                    program.trace(*arguments)
                drawn = program(*arguments)
            parts = [x.addressable_shards for x in jax.tree.leaves(drawn)]
            shares = [shards for shards in zip(*parts) if not shards[0].replica_id]  # of copies of rows, one is written
            for part in itertools.chain(*shares):
                part.data.copy_to_host_async()
            return images_of(shares, jax.tree.structure(drawn))

        def images_of(shares, structure):
            for shards in shares:
                values = [np.asarray(shard.data) for shard in shards]
                drawn, account = jax.tree.unflatten(structure, values)
                if here:
                    drawn = finished(to_float(decoder.host_decode(drawn)), given and (given.image, given.free))
                images, finite = map(np.asarray, drawn)
                if not finite.all():
                    raise ValueError(
                        f"images drawn from {self.model.folder} hold NaN or infinity; are its weights or those of "
                        f"{self.tokenizer.folder} damaged, or too large for {options.dtype}?"
                    )
                for i, image in enumerate(images):
                    calls = {name: int(count[i]) for name, count in account.calls.items()}
                    image = np.broadcast_to(image, (*image.shape[:2], 3))
                    yield Drawn((shards[0].index[0].start or 0) + i, image, calls, account.accepted[i])

        return draw


def side_by_side(images: UInt8[Array, "b p h w c"], gap: int = 2) -> UInt8[Array, "b h W c"]:
    """Pictures in a row, white between them."""
    images = jnp.pad(images, ((0, 0), (0, 0), (0, 0), (0, gap), (0, 0)), constant_values=255)
    return jnp.moveaxis(images, 1, 2).reshape(len(images), images.shape[2], -1, images.shape[-1])[:, :, :-gap]


def known_beforehand(generator: nn.Module, given: Given | None) -> np.ndarray:
    """Slots that are put first in the order, as they are known: bool [n], none if ranks must stay in their places."""
    if given is None or not generator.any_order:
        return np.zeros(generator.spec.n, bool)
    return np.asarray(~free_slots(generator.spec, given.free[None])[0])


def arranged(
    generator: nn.Module, order_fn: OrderFn, keys: Key[Array, "b"], pixels: Any, scales: int, known: np.ndarray
) -> tuple[Order, Edit | None]:
    """The order of numbered images, and what is given of them.

    Args:
      keys: of the orders.
      pixels: an image and the pixels that are free, the same for all; or None.
      scales: see `Given`.
      known: from `known_beforehand`.
    """
    if pixels is None:
        return order_fn(generator.spec, keys, len(keys), 0), None
    if generator.any_order:
        order = known_first(order_fn, generator.spec, known, keys)
    else:
        order = order_fn(generator.spec, keys, len(keys), 0)
    image, free = (jnp.broadcast_to(x, (len(keys), *x.shape)) for x in pixels)
    return order, Edit(to_float(image), free, scales, int(known.sum()))


def in_batches(draw: Draw, conditions: Batch, ids: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, list[Drawn]]]:
    """Draws numbered images; while one batch is used, the devices work on the next.

    Args:
      draw: from `Drawer.compile`.
      conditions: from `condition_table`, used in turn.
      ids: of the images.
      size: of a batch; the last one too runs the one compiled program.
    Yields:
      The numbers of a batch, and those of its images that this process holds.
    """
    waiting = None
    for first in [*range(0, len(ids), size), None]:
        begun = None
        if first is not None:
            some = ids[first : first + size]
            padded = np.resize(some, size)
            batch = {name: table[padded % len(table)] for name, table in conditions.items()}
            begun = some, draw(batch, padded)
        if waiting:
            some, images = waiting
            yield some, [drawn for drawn in images if drawn.row < len(some)]
        waiting = begun


def image_keys(seed: int | PRNGKey, ids: Int[Array, "b"]) -> tuple[Key[Array, "b"], Key[Array, "b"]]:
    """Keys for the tokens of numbered images and for their orders; `seed` may be its key."""
    roots = jax.random.split(key_of(seed) if isinstance(seed, int) else seed)
    return tuple(jax.vmap(functools.partial(jax.random.fold_in, root))(ids) for root in roots)


def by_token(generator: nn.Module, order: OrderFn) -> bool:
    """See `Order.by_token`."""
    return order(generator.spec, jax.random.split(jax.random.key(0), 1), 1, 0).by_token


def open_drawer(run: str, options: Sampler) -> Drawer:
    """The generator of a folder and its tokenizer.

    Raises:
      ValueError: no such models, or they do not fit each other or the options.
    """
    model, tokenizer = open_models(run, options)
    sampling = options.sampling or own_sampling(model, options.parts)
    parts = model.module, tokenizer.module, model.order
    if options.sampling is None:
        with blamed(model, tokenizer):
            sampling.adapted(*parts)
    sampling = dataclasses.replace(sampling, fields=changes(sampling, parts, options.fields))
    generator, decoder, order = sampling.adapted(*parts)
    for name, part in (("generator", generator), ("tokenizer", decoder), ("order", order)):
        codec.check(part, name)  # with what was changed of it
    makes, takes = generator.spec, decoder.spec
    if (makes.codes, makes.channels, makes.n) != (takes.codes, takes.channels, takes.n):

        def of(spec):
            return f"{spec.n} tokens " + (f"with codes {spec.codes}" if spec.codes else f"of {spec.channels} numbers")

        raise ValueError(
            f"{model.folder / 'model.json'}: the generator makes {of(makes)}, but the tokenizer {tokenizer.folder} has "
            f"{of(takes)}; give --tokenizer"
        )
    return Drawer(model.fixed(), tokenizer.fixed(), generator, decoder, order, sampling, options)


def condition_table(info: Info, options: Sampler, labels: tuple[str, ...] = ()) -> tuple[list[str], Batch]:
    """The conditions to go through in turn: their names, and arrays whose first axis runs over them.

    Raises:
      ValueError: a label the model does not know, or the wrong kind of condition for it.
    """
    if info.text_width:
        if labels:
            raise ValueError("--labels given, but this model takes captions; give --captions")
        if options.features:
            with np.load(seekable(path_of(options.features)), allow_pickle=False) as file:
                text, mask = file["features"].astype(np.float32), file["mask"].astype(bool)
            names = [f"features {i}" for i in range(len(text))]
        elif not options.captions:
            raise ValueError("this model takes captions; give --captions or --features")
        elif info.text == "minilm" or options.text_encoder:
            from ar_jax.text.encoder import open_encoder

            names, encoder = list(options.captions), open_encoder(options.text_encoder or "minilm")
            text, mask = encoder.encode(names, info.text_rows)
        else:
            raise ValueError(
                f"this model was trained on features of {info.text!r}; give its folder (config.json, tokenizer.json, "
                ".safetensors) with --text-encoder, or features with --features"
            )
        if text.shape[1:] != (info.text_rows, info.text_width) or mask.shape != text.shape[:2]:
            raise ValueError(
                f"{'--features has' if options.features else 'the text encoder makes'} shapes {text.shape} and {mask.shape}; the model needs [N {info.text_rows} "
                f"{info.text_width}] and [N {info.text_rows}]"
            )
        return names, {"text": text, "text_mask": mask}
    if options.captions or options.features:
        raise ValueError("captions given, but this model takes class labels; give --labels")
    everything = list(range(max(info.classes, 1)))  # without classes one condition, which is none
    ids = label_ids(info, list(labels)) if labels else everything
    names = [info.class_names[i] if info.class_names else str(i) for i in ids]
    return names, {"label": np.asarray(ids, np.int32)}
