"""What a config needs on a TPU pod that is not here: memory, operations, traffic, and an estimate of its speed.

    python -m ar_jax.plan CONFIG --topology v5e:16x16 [--topology v5p:8x8x8 ...] [--name.of.setting value ...]

    python -m ar_jax.plan configs/llamagen.py:xl_256 --topology v5e:16x16 --mesh.fsdp 16 --generator.batch 2048
    python -m ar_jax.plan configs/llamagen.py:xl_256 --topology v5e:2x4 --sample --images 64

Compiles the real training step and the preview between steps (or with --sample the real sampler) with the real TPU compiler,
which needs no TPU
(`pip install 'jax[tpu]'`, in an environment of its own: only one process at a time can hold it), and reads the result. The estimate assumes that every operation takes the longer of computing at the
chip's peak and moving its data at the full bandwidth, one after the other, while collectives run beside them. Real steps
take longer. Exits with 1 if the program does not fit, and names a setting with which it does.
"""

import dataclasses
import functools
import itertools
import math
import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from ar_jax.config import Experiment, Stage, load_config, parse
from ar_jax.decode.sequential import Sequential
from ar_jax.files import codec
from ar_jax.files.models import untrained
from ar_jax.files.places import on_disk
from ar_jax.files.trust import taken
from ar_jax.machine.chips import Chip, chip, unknown
from ar_jax.machine.flops import model_flops, with_fields
from ar_jax.machine.hlo import Program, Work
from ar_jax.machine.sharding import batch_sharding, make_mesh, replicated, shard
from ar_jax.nets.linear import cast
from ar_jax.orders import Order
from ar_jax.tokenize import kept
from ar_jax.tokenizers.host import on_host
from ar_jax.train.recipes import generator_recipe
from ar_jax.train.tokenizer import tokenizer_recipe


@dataclasses.dataclass(frozen=True)
class Options:
    """What to plan for."""

    config: Annotated[str, tyro.conf.Positional]
    """Config file; all its settings can be given too, as for train.py."""
    topology: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """A slice such as v5e:16x16, v5p:8x8x8, v6e:16x16 or v4:2x2x1; may be given several times."""
    slices: int = 1
    """So many of each, joined by the data centre's network; `--mesh.data` must be a multiple of it."""
    stage: Literal["", "generator", "tokenizer"] = ""
    """Whose training; empty takes the generator's if the config has one."""
    sample: bool = False
    """Plan the sampler instead of training."""
    images: int = 64
    """Images a chip draws at a time (--sample)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the sampler's parameters."""
    segments: int = 0
    """Parts in which the sampler's cache grows; 0 leaves the config's decoder as it is, which mostly chooses by itself."""
    operations: int = 0
    """List so many of the longest operations."""
    hlo: str = ""
    """Folder to write the compiled programs to, as text."""


def main(arguments: list[str] | None = None) -> None:
    prog = "python -m ar_jax.plan"
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if not arguments:
            raise SystemExit(__doc__)
        arguments = taken(arguments)
        if "--help" in arguments or "-h" in arguments:
            tyro.cli(Options, args=["--help"], prog=prog, description=__doc__)
        options, overrides = tyro.cli(Options, args=arguments, prog=prog, return_unknown_args=True)
        codec.check(options)
        experiment = parse(load_config(options.config), overrides, f"{prog} {options.config}", __doc__)
        if not options.topology:
            raise ValueError("give at least one --topology, such as v5e:16x16")
        fits = [plan(experiment, options, name) for name in options.topology]
    except (ValueError, OSError) as error:
        raise SystemExit(f"{prog}: {error}") from error
    sys.exit(0 if all(fits) else 1)


def plan(experiment: Experiment, options: Options, topology: str) -> bool:
    """Prints the table of one topology; whether the program fits its chips."""
    devices = topology_devices(topology, options.slices)
    limits = chip(devices[0])
    if limits is None:
        raise ValueError(f"--topology {topology}: {unknown(devices[0])}")
    mesh = make_mesh(experiment.mesh, devices)
    compiled = compile_for(experiment, options, mesh)
    rows = {
        "config": options.config + (" (sampler)" if options.sample else ""),
        "topology": f"{f'{options.slices} x ' * (options.slices > 1)}{topology}, {len(devices)} x {devices[0].device_kind}",
        **compiled.facts,
    }
    if compiled.program is not None:
        rows |= estimate(compiled, options, mesh, limits)
    rows["fits"] = compiled.verdict(limits)
    fits = rows["fits"].startswith("yes")
    if not fits:
        rows["remedy"] = remedy(experiment, options, devices, limits)
    width = max(map(len, rows))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()), flush=True)
    if compiled.program is not None and options.operations:
        parts = compiled.program.work(limits.flops, limits.bandwidth, network(mesh, limits))
        print(f"{'ms':>10} {'GFLOP':>10} {'MB':>10}  operation")
        for source, work in list(parts.items())[: options.operations]:
            print(f"{work.seconds * 1e3:10.3f} {work.flops / 1e9:10.1f} {work.bytes / 1e6:10.1f}  {source}")
    print()
    return fits


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program for a topology.

    Attributes:
      facts: rows of the table known before compiling.
      program: the compiled text, or None if the compiler refused it for lack of memory.
      memory: bytes per chip by kind, or what the compiler said.
      model: operations the model asks for, over all chips.
      images: made or seen in one run, over all chips.
      step: bytes that one decoding step has to move on a chip; 0 for training.
      steps: decoding steps; 1 for training.
      preview: bytes per chip while training draws its preview, the state in its place; or what the compiler said.
    """

    facts: dict[str, str]
    program: Program | None
    memory: dict[str, float] | str
    model: float
    images: int
    step: float = 0.0
    steps: int = 1
    preview: float | str = 0.0

    def verdict(self, limits: Chip) -> str:
        if isinstance(self.memory, str):
            return f"NO: {self.memory}"
        if isinstance(self.preview, str):
            return f"NO: the preview: {self.preview}"
        total = sum(self.memory.values())
        said = f"{total / 1e9:.2f} of {limits.hbm / 1e9:.0f} GB a chip"
        if self.preview:
            said += f", {self.preview / 1e9:.2f} GB during a preview"
        return f"{'yes' if max(total, self.preview) <= limits.hbm else 'NO'}: {said}"


def estimate(compiled: Compiled, options: Options, mesh: jax.sharding.Mesh, limits: Chip) -> dict[str, str]:
    """Rows of the table about work and time."""
    total = Work()
    for work in compiled.program.work(limits.flops, limits.bandwidth, network(mesh, limits)).values():
        total.add(work)
    seconds, chips = max(total.seconds, total.network), mesh.size
    moved = ", ".join(f"{kind} {amount / 1e6:.1f} MB" for kind, amount in sorted(total.collectives.items()))
    memory = ", ".join(f"{kind} {amount / 1e9:.3f} GB" for kind, amount in compiled.memory.items())
    what = "run" if options.sample else "step"
    rows = {
        "memory a chip": memory,
        f"model FLOPs a {what}": f"{compiled.model / 1e12:.2f} T",
        f"compiled FLOPs a {what}": f"{total.flops * chips / 1e12:.2f} T, {total.flops * chips / compiled.model:.3f} x",
        "HBM traffic a chip": f"{total.bytes / 1e9:.2f} GB",
        "collectives a chip": moved or "none",
        "at the chip's limits": (
            f"compute {total.flops / limits.flops * 1e3:.2f} ms, memory {total.bytes / limits.bandwidth * 1e3:.2f} ms, "
            f"one by one {total.seconds * 1e3:.2f} ms, network {total.network * 1e3:.2f} ms"
        ),
        f"estimated {what}": f"{seconds * 1e3:.2f} ms, {compiled.images / seconds / chips:.1f} images/s a chip",
        "estimated MFU": f"{compiled.model / chips / limits.flops / seconds:.1%}",
        "figures of the chip": (
            f"{limits.flops / 1e12:.0f} TFLOP/s, {limits.bandwidth / 1e9:.0f} GB/s, {limits.link / 1e9:.0f} GB/s a link "
            f"and direction ({limits.source})"
        ),
    }
    if compiled.program.unknown:
        rows["loops of unknown length"] = f"{len(compiled.program.unknown)}, counted as one iteration each"
    if compiled.step:
        each = total.bytes / compiled.steps
        rows["traffic of a decoding step"] = (
            f"{each / 1e9:.3f} GB, {each / compiled.step:.3f} x weights, cache and logits ({compiled.step / 1e9:.3f} GB)"
        )
    return rows


def topology_devices(name: str, slices: int = 1) -> list[Any]:
    """Devices of TPU slices that need not exist.

    Raises:
      ValueError: libtpu is missing, or there is no such slice.
    """
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost",
    }.items():  # fmt: skip
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")  # whatever is computed while planning
    from jax.experimental import topologies

    try:
        many = {"num_slices": slices} if slices != 1 else {}
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **many).devices)
    except Exception as error:  # of the plugin, of many kinds
        raise ValueError(
            f"--topology {name}: {error}. Give a slice such as v5e:16x16 or v5p:8x8x8, and install the compiler that "
            "fits this JAX with pip install 'jax[tpu]'; one process at a time can hold it"
        ) from error


def network(mesh: jax.sharding.Mesh, limits: Chip) -> Callable[[list[int]], float]:
    """Bytes per second that a chip receives in a collective among some devices: two ports per torus axis they span.

    Among slices it is a chip's part of the data centre's network.

    Raises:
      ValueError: there are several slices of chips for which nobody published that.
    """
    places = np.array([device.coords for device in mesh.devices.flat])
    slices = np.array([getattr(device, "slice_index", 0) for device in mesh.devices.flat])
    if np.ptp(slices) and not limits.dcn:
        raise ValueError(f"--slices: {limits.source} does not say how fast slices are joined; plan one")

    def speed(group: list[int]) -> float:
        if np.ptp(slices[group] if group else slices):
            return limits.dcn
        spanned = sum(len(np.unique(axis)) > 1 for axis in places[group].T) if group else places.shape[1]
        return 2 * max(spanned, 1) * limits.link

    return speed


def _text(compiled):
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        (fits,) = (word.partition(";")[0] for word in metadata.requires("jax") or () if word.startswith("libtpu"))
        raise ValueError(
            f"jaxlib {metadata.version('jaxlib')} cannot read the program that libtpu {metadata.version('libtpu')} made; "
            f"pip install '{fits}', which was released with this JAX ({str(error).splitlines()[0]:.200})"
        ) from error


def compile_for(experiment: Experiment, options: Options, mesh: jax.sharding.Mesh) -> Compiled:
    """Compiles what `options` ask for."""
    facts, function, arguments, rest, preview = (sampler if options.sample else trainer)(experiment, options, mesh)
    facts |= {"mesh": ", ".join(f"{name} {size}" for name, size in mesh.shape.items())}
    start = time.perf_counter()
    compiled, memory = _compiled(function, arguments, mesh)
    facts["compile time"] = f"{time.perf_counter() - start:.1f} s"
    if compiled is None:
        return Compiled(facts, None, memory, **rest)
    if preview is not None:
        drawn, beside = preview()
        start = time.perf_counter()
        _, held = _compiled(*drawn, mesh)
        facts["compile time"] += f", of the preview {time.perf_counter() - start:.1f} s"
        rest["preview"] = held if isinstance(held, str) else sum(held.values()) + beside
    text = _text(compiled)
    if options.hlo:
        os.makedirs(on_disk(options.hlo, "--hlo"), exist_ok=True)
        with open(os.path.join(options.hlo, f"{experiment.name}_{mesh.devices.flat[0].device_kind}.hlo"), "w") as file:
            file.write(text)
    return Compiled(facts, Program(text), memory, **rest)


def _compiled(function: Any, arguments: tuple, mesh: jax.sharding.Mesh) -> tuple[Any, dict[str, float] | str]:
    """The program and its bytes per chip by kind; or None and what the compiler said of memory."""
    with jax.set_mesh(mesh):
        lowered = function.lower(*arguments)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            said = next((line for line in str(error).splitlines() if "Used" in line), str(error).splitlines()[0])
            return None, said.strip()
    stats = compiled.memory_analysis()
    return compiled, {
        "arguments": stats.argument_size_in_bytes,
        "results": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }


def trainer(
    experiment: Experiment, options: Options, mesh: jax.sharding.Mesh
) -> tuple[dict, Any, tuple, dict, Callable | None]:
    """Facts, jitted update, its arguments as shapes, the rest of `Compiled`, and what makes the preview.

    That is the jitted preview with its arguments, and the bytes on a chip of the state that lies beside them.
    """
    generator, tokenizer = untrained(experiment)
    what = options.stage or ("generator" if generator is not None else "tokenizer")
    stage: Stage = getattr(experiment, what)
    if what == "generator" and generator is None:
        raise ValueError("--stage generator: the config has no generator")
    if stage.batch % (mesh.shape["data"] * mesh.shape["fsdp"] * stage.optim.accumulate):
        raise ValueError(
            f"{what}.batch is {stage.batch}, which mesh data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']} (and "
            f"optim.accumulate {stage.optim.accumulate}) cannot share equally"
        )

    if what == "tokenizer":
        recipe = tokenizer_recipe(stage, tokenizer)
    else:
        frozen = jax.eval_shape(tokenizer.init_params, jax.random.key(0))
        recipe = generator_recipe(stage, generator, tokenizer, frozen)
    batch = shapes_of_batch(experiment, generator if what == "generator" else None, tokenizer, stage, stage.batch)
    state = jax.eval_shape(recipe.init, jax.random.key(0))
    layout = shard(state, mesh, recipe.rules)
    frozen, key = recipe.frozen, jax.eval_shape(lambda: jax.random.key(0))
    arguments = (
        placed(state, layout), placed(frozen, replicated(mesh)), placed(batch, batch_sharding(mesh)),
        placed(key, replicated(mesh)),
    )  # fmt: skip
    update = jax.jit(recipe.update, donate_argnums=0, out_shardings=(layout, replicated(mesh)))
    facts = {
        "parameters": f"{sum(x.size for x in jax.tree.leaves(state.params)) / 1e6:.1f} M",
        "global batch": f"{stage.batch} images, {stage.batch / mesh.size:g} a chip",
    }

    def preview():
        """As `loop.fit` has it; an evaluation draws as many images at a time, and nothing else."""
        share = mesh.shape["data"] * mesh.shape["fsdp"]
        images = -(-stage.preview_images // share) * share
        shown = shapes_of_batch(experiment, generator if what == "generator" else None, tokenizer, stage, images)
        if images > stage.preview_images:
            shown["valid"] = jax.ShapeDtypeStruct((images,), jnp.float32)
        taken = (arguments[0].params["model"], arguments[1], placed(shown, batch_sharding(mesh)), arguments[3])
        beside = held_by_a_chip(arguments[0]) - held_by_a_chip(taken[0])
        return (jax.jit(recipe.preview, out_shardings=replicated(mesh)), taken), beside

    rest = {"model": recipe.flops(state, frozen, batch, key), "images": stage.batch}
    return facts, update, arguments, rest, preview if stage.preview_every or stage.evaluate_every else None


def held_by_a_chip(tree: Any) -> int:
    """Bytes of placed shapes on one device."""
    each = (math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
    return sum(each)


def shapes_of_batch(
    experiment: Experiment, generator: Any, tokenizer: Any, stage: Stage, images: int
) -> dict[str, Any]:
    """A batch as training sees it."""
    if generator is None:
        return {"image": jax.ShapeDtypeStruct((images, *tokenizer.size, tokenizer.channels), jnp.uint8)}
    example = jax.eval_shape(generator.conditioning.example)
    batch = {name: jax.ShapeDtypeStruct((images, *x.shape[1:]), x.dtype) for name, x in example.items()}
    image = jax.ShapeDtypeStruct((images, *tokenizer.size, tokenizer.channels), jnp.uint8)
    if stage.tokens and getattr(tokenizer, "draws", False):
        params = jax.eval_shape(tokenizer.init_params, jax.random.key(0))
        batch["moments"] = jax.eval_shape(functools.partial(kept, tokenizer), params, image, None)
    elif stage.tokens or on_host(tokenizer):
        batch["tokens"] = jax.eval_shape(lambda: tokenizer.spec.zeros(images))
    else:
        batch["image"] = image
    return batch


def sampler(experiment: Experiment, options: Options, mesh: jax.sharding.Mesh) -> tuple[dict, Any, tuple, dict, None]:
    """Facts, jitted token loop, its arguments as shapes, the rest of `Compiled`, and nothing."""
    generator, tokenizer = untrained(experiment)
    if generator is None:
        raise ValueError("--sample: the config has no generator")
    sampling = experiment.generator.sampling
    if options.segments:
        kept = getattr(sampling.decoder, "cache", "own")
        sampling = dataclasses.replace(sampling, decoder=Sequential(options.segments, kept))
    generator, tokenizer, order_fn = sampling.adapted(generator, tokenizer, experiment.generator.order)
    dtype, images = jnp.dtype(options.dtype).type, options.images * mesh.size
    generator = with_fields(generator, dtype=dtype)
    stacked = jax.eval_shape(lambda key: cast(generator.init_params(key), dtype), jax.random.key(0))
    laid_out = []
    params = jax.eval_shape(lambda params: laid_out.append(generator.unrolled(params)) or laid_out[0][1], stacked)
    generator = laid_out[0][0]
    order = order_fn(generator.spec, jax.random.split(jax.random.key(0), images), images, 0)
    guided = bool((sampling.knobs(order, generator.spec).guidance != 1).any())

    def draw(params, frozen, batch, keys):
        call = functools.partial(tokenizer.apply, {"params": frozen})
        return sampling.tokens(generator, params, batch, order, tokenizer=call, keys=keys)[0]

    example = jax.eval_shape(generator.conditioning.example)
    batch = {name: jax.ShapeDtypeStruct((images, *x.shape[1:]), x.dtype) for name, x in example.items()}
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), images))
    over_batch = batch_sharding(mesh)
    layout = shard(params, mesh, generator.rules)
    frozen = jax.eval_shape(tokenizer.init_params, jax.random.key(0))
    arguments = (
        placed(params, layout), placed(frozen, replicated(mesh)), placed(batch, over_batch), placed(keys, over_batch)
    )  # fmt: skip
    facts = {
        "parameters": f"{sum(x.size for x in jax.tree.leaves(params)) / 1e6:.1f} M in {options.dtype}",
        "images": f"{images}, {options.images} a chip, guidance {'on' if guided else 'off'}, {len(order.sizes)} steps",
    }
    per_replica = images * (2 if guided else 1) // (mesh.shape["data"] * mesh.shape["fsdp"])
    rest = {
        "model": model_flops(draw, params, frozen, batch, keys), "images": images, "steps": len(order.sizes),
        "step": step_bytes(generator, params, per_replica, order, sampling.decoder) / mesh.shape["tp"],
    }  # fmt: skip
    return facts, jax.jit(draw), arguments, rest, None


def step_bytes(generator: Any, params: Any, rows: int, order: Order, decoder: Any) -> float:
    """Bytes a decoding step has to move, on average: all weights once, the cache as long as it is then, float32 logits."""
    net = getattr(generator, "backbone", None)  # masked generators have none, and no cache
    cached = net is not None and jax.eval_shape(lambda: net.empty_cache(1)) is not None
    read = {name: part for name, part in params.items() if name not in ("inputs", "conditioning")}
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(read))
    before = generator.conditioning.example().get("text", np.zeros((1, 1))).shape[1] - 1
    segments = decoder.parts(order, cached) if isinstance(decoder, Sequential) else 1
    known, ends = 0, []
    for size, run in itertools.groupby(order.sizes):
        parts = np.array_split(known + size * np.arange(1, len(list(run)) + 1), segments)
        ends += [part[-1] for part in parts for _ in part]
        known = ends[-1]
    row = jax.eval_shape(lambda: net.empty_cache(1, getattr(decoder, "cache", "own"))) if cached else ()
    row = jax.eval_shape(lambda cache: cache.grow(1), row) if cached else ()
    cache = rows * (before + np.mean(ends)) * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(row))
    return weights + cache + rows * np.mean(order.sizes) * sum(generator.spec.codes) * 4


def placed(tree: Any, where: Any) -> Any:
    """Shapes with shardings."""
    if isinstance(where, jax.sharding.Sharding):
        where = jax.tree.map(lambda _: where, tree)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, where)


def remedy(experiment: Experiment, options: Options, devices: list[Any], limits: Chip) -> str:
    """A setting with which it fits, found by compiling; or what was tried."""
    tried = []
    for arguments in knobs_to_turn(experiment, options, len(devices)):
        try:
            changed = parse(experiment, arguments, "plan", "")
            verdict = compile_for(changed, options, make_mesh(changed.mesh, devices)).verdict(limits)
        except ValueError:
            continue  # a mesh that does not divide the batch or the network
        said = " ".join(arguments)
        if verdict.startswith("yes"):
            return f"{said} ({verdict})"
        tried.append(f"{said} ({verdict})")
    return "none of " + "; ".join(tried)


def knobs_to_turn(experiment: Experiment, options: Options, chips: int) -> list[list[str]]:
    """Settings that save memory, the least costly first."""
    if options.sample:
        return [["--mesh.tp", "2"], ["--mesh.tp", "4"], ["--mesh.fsdp", str(chips)]]
    stage = options.stage or ("generator" if experiment.generator.module is not None else "tokenizer")
    settings = getattr(experiment, stage)
    parts = [n for n in (4, 16, 64, chips) if experiment.mesh.fsdp < n <= chips]
    fsdp = [["--mesh.data", "-1", "--mesh.fsdp", str(n)] for n in dict.fromkeys(parts)]
    nets = {name: getattr(settings.module, name, None) for name in ("backbone", "encoder", "decoder")}
    nets = {name: net.remat for name, net in nets.items() if stage == "generator" and hasattr(net, "remat")}
    recompute = [
        [word for name in nets for word in (f"--{stage}.module.{name}.remat", kind)]
        for kind in ("dots", "full")
        if any(now != kind for now in nets.values())
    ]
    accumulate = [[f"--{stage}.optim.accumulate", str(settings.optim.accumulate * n)] for n in (2, 4)]
    all_of_them = [*(fsdp[-1] if fsdp else []), *(recompute[-1] if recompute else []), *accumulate[-1]]
    previews = [[f"--{stage}.preview-every", "0"]] * bool(settings.preview_every)
    return [*fsdp, *recompute, *accumulate, [f"--{stage}.batch", str(settings.batch // 2)], *previews, all_of_them]


if __name__ == "__main__":
    main()
