"""Trains the tokenizer and the generator of a config, or goes on where the same command stopped.

    python train.py CONFIG [--name.of.setting value ...]

    python train.py configs/llamagen.py                the variants of a family
    python train.py configs/llamagen.py:mnist5k
    python train.py configs/llamagen.py:mnist5k --name mine --generator.optim.lr 3e-4
    python train.py CONFIG --help                      all settings and their values

The run folder (runs/NAME) holds checkpoints, pictures, TensorBoard logs and metrics.jsonl of both stages;
`python sample.py runs/NAME` draws from it. SIGTERM or a preemption notice ends it with exit code 75 once the state is
saved, Ctrl-C with 130.
"""

import dataclasses
import functools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from ar_jax.config import Experiment, GeneratorStage, Stage, keep_config, load_config, parse
from ar_jax.data import Data, Info, NoSplit, Opened, Spread, batches, plain
from ar_jax.evals.training import Evaluation
from ar_jax.files import codec
from ar_jax.files.models import Model, describe, fingerprint, open_model, versions
from ar_jax.files.places import path_of
from ar_jax.files.trust import taken, trust
from ar_jax.machine import distributed
from ar_jax.machine.claim import claim
from ar_jax.machine.compiled import keep_compiled
from ar_jax.machine.huge_pages import use_huge_pages
from ar_jax.machine.precision import multiply_in, products
from ar_jax.machine.seeds import key_of
from ar_jax.machine.sharding import batch_part, batch_rows, make_mesh
from ar_jax.tokenize import check_cache
from ar_jax.tokenizers.host import encoded, on_host
from ar_jax.train import wandb
from ar_jax.train.checkpoint import is_there, load_matching, newest, save_params
from ar_jax.train.guards import Stopped
from ar_jax.train.history import note
from ar_jax.train.log import Board
from ar_jax.train.loop import fit, partners
from ar_jax.train.measure import inherited, measured, remembered
from ar_jax.train.recipes import Recipe, generator_recipe
from ar_jax.train.tokenizer import tokenizer_recipe
from ar_jax.typing import Batch, Params, PRNGKey


def main(arguments: list[str]) -> None:
    if not arguments:
        raise SystemExit(__doc__)
    if arguments[0] in ("-h", "--help"):
        print(__doc__)
        return
    with distributed.command("train.py"):
        config, *overrides = taken(arguments) or [""]
        experiment = parse(load_config(config), overrides, f"train.py {config}", __doc__)
        distributed.join(experiment.launch, notices=True)
        keep_compiled()
        try:
            with multiply_in(experiment.precision), claim(path_of(experiment.out) / experiment.name):
                train(experiment, config, overrides)
        except Stopped as stopped:
            distributed.say(f"train.py: {stopped}")
            raise SystemExit(stopped.code) from stopped


def train(experiment: Experiment, config: str, overrides: list[str]) -> None:
    """Runs both stages of an experiment.

    The config's code has run when this is called, so the modules of what it configures are trusted in this process (see
    `codec.encode`): a run with methods of one's own goes on without `--trust`.
    """
    written = codec.encode(experiment)
    if ":" in experiment.data.name:
        trust(experiment.data.name.partition(":")[0])
    if experiment.log not in ("here", "wandb"):
        raise ValueError(f"log is {experiment.log!r}; it must be here or wandb")
    beside = wandb.opener(experiment.name, written) if experiment.log == "wandb" else None
    run = path_of(experiment.out) / experiment.name
    distributed.check_shared(run)
    mesh = make_mesh(experiment.mesh)
    stages = {"tokenizer": experiment.tokenizer, "generator": experiment.generator}
    done = {kind: newest(run / kind / "checkpoints") for kind in stages}
    todo = {kind: stage.steps for kind, stage in stages.items() if stage.steps and not stage.path}
    for kind in todo:
        batch_rows(mesh, stages[kind].batch, f"{kind}.batch")  # both are known to fit before either is trained on
    if done["generator"] and done["tokenizer"] < todo.get("tokenizer", 0) and not stages["generator"].other_tokenizer:
        raise ValueError(
            f"{run}: {done['generator']} updates of the generator are made for the tokenizer as it is, and tokenizer.steps="
            f"{todo['tokenizer']} would change that from update {done['tokenizer']} on. Give --tokenizer.steps {done['tokenizer']}, "
            "--name for a new run, or --generator.other-tokenizer True to train the generator on for the changed one"
        )
    split = experiment.data.shards == "split"
    opened = Opened(batch_part(mesh) if split else (0, 1))
    made = run / "generator"
    if (made / "model.json").exists():  # which classes its numbers mean does not change
        data = experiment.data
        if experiment.generator.tokens:
            data = dataclasses.replace(data, name="tokens", path=experiment.generator.tokens)
        opened.like(data, open_model(made, "generator").info, str(made))
    source = opened(experiment.data)
    info = source.info
    distributed.say(
        f"{run}: {len(source)} images of {experiment.data.name}{' here' * split}, {info.classes or 'no'} classes, "
        f"mesh {dict(mesh.shape)} of {jax.devices()[0].device_kind}, float32 is multiplied in "
        f"{products(experiment.precision)}"
    )
    tokenizer_settings = {"data": lasting(experiment.data)}
    tokenizer = prepare(experiment.tokenizer, "tokenizer", run / "tokenizer", info, tokenizer_settings)
    size = getattr(tokenizer.module, "size", None)
    if size and tuple(size) != (experiment.data.size,) * 2:
        height, width = size
        raise ValueError(
            f"data.size is {experiment.data.size}, but the tokenizer's images have {height}x{width} pixels; give --data.size "
            f"{height}" + " or --tokenizer.module.size" * (not experiment.tokenizer.path)
        )
    stage, data, generator = experiment.generator, experiment.data, None
    if stage.steps or stage.path:  # both networks are known to fit before either is trained
        if stage.tokens:
            # the cache holds the features
            data = dataclasses.replace(data, name="tokens", path=stage.tokens, text="", shards="all")
            info = opened(data).info
        if stage.module is not None:
            stage = dataclasses.replace(stage, module=stage.module.complete(tokenizer.module.spec, info))
        settings = {
            "tokenizer": "../tokenizer", "order": codec.encode(stage.order),
            "sampling": codec.encode(stage.sampling), "data": lasting(data),
        }  # fmt: skip
        generator = prepare(stage, "generator", run / "generator", info, settings)
    if jax.process_index() == 0:
        keep_config(config, run / "config.py")
        facts = {"config": config, "overrides": overrides, "versions": versions(), "experiment": written}
        for line in note(run / "run.json", facts, done, any(done[name] < steps for name, steps in todo.items())):
            print(f"{run}: {line}")

    tokenizer_key, generator_key = jax.random.split(key_of(experiment.seed))
    if experiment.tokenizer.steps and not experiment.tokenizer.path:
        recipe = tokenizer_recipe(experiment.tokenizer, tokenizer.module)
        stage_fit(
            recipe, experiment.tokenizer, experiment, experiment.data, opened, tokenizer, mesh, tokenizer_key, beside
        )
    if not experiment.tokenizer.path:
        tokenizer = measured(tokenizer, experiment.tokenizer.module, source, experiment.data, experiment.seed)
    if generator and stage.tokens:
        check_cache(data, tokenizer, opened(plain(data)))
    if generator and not stage.path:
        generator = trained_on(generator, tokenizer, stage, done["generator"])
        recipe = generator_recipe(stage, generator.module, tokenizer.module, tokenizer.params())
        then = encoded(tokenizer.module) if on_host(tokenizer.module) else None
        stage_fit(recipe, stage, experiment, data, opened, generator, mesh, generator_key, beside, then)


def prepare(stage: Stage, kind: str, folder: Path, info: Info, settings: dict) -> Model:
    """Describes the stage's network in its folder; with `stage.path`, copies that network there.

    Raises:
      ValueError: the folder already holds another network.
    """
    module = stage.module
    if stage.path and stage.start:
        raise ValueError(f"{kind}.path takes a network as it is, {kind}.start trains it on; give one of them")
    if stage.path and stage.parts:
        raise ValueError(
            f"{kind}.path takes a network as it is, {kind}.parts trains parts of others on; give one of them"
        )
    if stage.fresh and not stage.start:
        raise ValueError(f"{kind}.fresh is {stage.fresh}, but {kind}.start is empty; everything begins anew")
    given = open_model(stage.path, kind) if stage.path else None
    if given:
        module, info = given.module, given.info
        settings = settings | {"origin": given.settings.get("origin", str(given.folder))}
    if module is None:
        raise ValueError(f"{kind}.module is not set; give a network in the config, or {kind}.path")
    begun = (folder / "model.json").exists()
    module = inherited(module, kind, folder if begun else stage.start, () if begun else stage.parts)
    if begun:
        old = open_model(folder, kind)
        module, settings = remembered(module, settings, old)
        settings = settings | {name: old.settings[name] for name in ("trained_on",) if name in old.settings}
        difference = codec.difference(codec.encode(old.module), codec.encode(module))
        if difference:
            raise ValueError(
                f"{folder} already holds another {kind}: {difference}. Give --name for a new run, or remove the folder"
            )
    if given and distributed.agreed(not is_there(folder / "params")):
        params = given.params()
        if params:  # patches of pixels have none
            save_params(folder / "params", jax.device_get(params))
    return describe(folder, kind, module, info, settings)


def lasting(data: Data) -> dict[str, Any]:
    """Fields of data, for `model.json`: paths on disks hold from any working directory."""

    def kept(text):
        path = os.path.expanduser(text)
        there = text not in ("", "minilm") and "://" not in text and (os.path.exists(path) or "{" in text)
        return os.path.abspath(path) if there else text

    return dataclasses.asdict(data) | {"path": kept(data.path), "text": kept(data.text)}


def trained_on(generator: Model, tokenizer: Model, stage: GeneratorStage, done: int) -> Model:
    """The generator, whose `model.json` now says for which tokenizer it is trained.

    Args:
      done: its updates so far.
    Raises:
      ValueError: these were made for another one.
    """
    was, now = generator.settings.get("trained_on"), fingerprint(tokenizer.params())
    if was == now:
        return generator
    if was and done and not stage.other_tokenizer:
        raise ValueError(
            f"{generator.folder}: its {done} updates are made for a tokenizer with other parameters than {tokenizer.folder} "
            "has now. Bring that one back, give --name for a new run, or --generator.other-tokenizer True to train on"
        )
    settings = generator.settings | {"trained_on": now}
    return describe(generator.folder, generator.kind, generator.module, generator.info, settings)


def stage_fit(
    recipe: Recipe,
    stage: Stage,
    experiment: Experiment,
    data: Data,
    opened: Opened,
    model: Model,
    mesh: jax.sharding.Mesh,
    key: PRNGKey,
    beside: Callable[[Path], Board] | None = None,
    then: Callable[[Batch], Batch] | None = None,
) -> None:
    rows = batch_rows(mesh, stage.batch)
    stream = batches(opened(data), data, batch=stage.batch, seed=experiment.seed, rows=rows, then=then)
    start = functools.partial(load_start, stage, model.kind) if stage.start or stage.parts else None
    evaluate = None
    if stage.evaluate_every:
        many = -(-stage.evaluate_images // stage.preview_images) * stage.preview_images
        real = plain(experiment.data)
        evaluate = Evaluation(recipe, stage, model.kind, Spread(opened(data), many), data, opened(real), real, mesh)
    shown, of = shown_images(opened, data, stage.preview_images, model.kind)
    shown = then(shown) if then else shown
    if stage.keep_best and stage.best != "fd" and of != "held_out":
        raise ValueError(
            f"{model.kind}.keep_best is {stage.keep_best}, but there are no held-out images to judge {model.kind}.best="
            f"{stage.best} by; add a validation folder (val/ beside train/), or give best=fd"
        )
    with jax.set_mesh(mesh):
        fit(recipe, stage, stream, shown, model.folder, mesh, key, start, evaluate, of, beside)


def load_start(stage: Stage, kind: str, params: Params) -> Params:
    """The parameters of `stage.start` and `stage.parts` in the place of shapes, but for those of `stage.fresh`."""
    loaded = params
    if stage.start:
        others = tuple(f"^{re.escape(part)}/" for part, _ in stage.parts)
        loaded = begun_as(stage.start, kind, params, (*stage.fresh, *others), kind)
    for part, other in stage.parts:
        if part not in params:
            raise ValueError(f"{kind}.parts has {part!r}, which is no part of the network; it has {tuple(params)}")
        loaded = {**loaded, part: begun_as(other, kind, params[part], (), f"{kind}, {part}")}
    for part, other in stage.alike:
        partners(loaded, part, other)
    return loaded


def begun_as(start: str, kind: str, params: Params, fresh: tuple[str, ...], name: str) -> Params:
    """The parameters of a folder in the place of shapes, but for those of `fresh`; `name` is what is said of them."""
    folder, part = open_model(start, kind).place()
    loaded, stayed, unused = load_matching(folder, params, part, fresh)
    count = len(jax.tree.leaves(params))
    if jax.process_index() == 0:
        print(f"{name}: {count - len(stayed)} of {count} arrays begin as in {folder} ({part}), with a fresh optimiser")
        print(f"{name}: begin anew: {', '.join(stayed) or 'none'}")
        if unused:
            print(f"{name}: of no use here: {', '.join(unused)}")
    return loaded


def shown_images(opened: Opened, data: Data, count: int, kind: str) -> tuple[Batch, str]:
    """Images spread evenly over the held-out split, or over the training images if there is none; and which they are."""
    try:
        held_out = dataclasses.replace(data, split="test", shards="all")  # few, so all hosts open them
        source, data, of = opened(held_out), held_out, "held_out"
    except NoSplit as error:
        source, of = opened(data), "train_sample"
        distributed.say(
            f"{kind}: no held-out images ({error}); pictures and the figures {of}/... are of training images"
        )
    picked = Spread(source, int(distributed.agreed(min(count, len(source)))))
    return next(iter(batches(picked, data, batch=len(picked), seed=0, train=False))), of


if __name__ == "__main__":
    use_huge_pages()
    main(sys.argv[1:])
