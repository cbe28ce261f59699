"""The planner on CPU devices: the same programs, another compiler. With libtpu installed, one real slice too."""

import dataclasses
import importlib.util
import types

import jax
import numpy as np
import pytest

from ar_jax import plan
from ar_jax.config import Experiment, GeneratorStage, Losses, Sampling, TokenizerStage
from ar_jax.data import Data
from ar_jax.decode.guidance import Interval
from ar_jax.generators.causal import Causal
from ar_jax.machine.chips import CHIPS, Chip, chip, peak_flops, unknown
from ar_jax.machine.sharding import MeshShape, make_mesh
from ar_jax.nets.conditioning import Label
from ar_jax.nets.transformer import Transformer
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.train.optim import Optim

TINY = Experiment(
    name="tiny",
    data=Data(size=16),
    tokenizer=TokenizerStage(
        module=VQGAN(
            size=(16, 16), features=8, mult=(1, 2), res_blocks=1, latent=8, codes=32, code_features=4, groups=4
        ),
        losses=Losses(lpips=0.0, adversarial=0.0), steps=1, batch=8, preview_every=0,
    ),
    generator=GeneratorStage(
        module=Causal(Transformer(layers=2, width=32, heads=2, hidden=64), Label(32)), steps=1, batch=16,
        tokens="cache", sampling=Sampling(Interval(2.0)), optim=Optim(), preview_every=0,
    ),
)  # fmt: skip
LIMITS = Chip(1e12, 1e9, 1e11, 1e10, "invented")


def options(**changes):
    return plan.Options(**{"config": "tiny.py", "topology": ("none",), "images": 2, "dtype": "float32"} | changes)


def mesh(**shape):
    shape = MeshShape(**{"data": 1} | shape)
    return make_mesh(shape, jax.devices()[: abs(shape.data * shape.fsdp * shape.tp)])


def rows(compiled, asked, on):
    return plan.estimate(compiled, asked, flat(on), LIMITS) | {"fits": compiled.verdict(LIMITS)}


def flat(on):
    """A mesh whose devices have places, as a TPU's."""
    places = [types.SimpleNamespace(coords=(i, 0, 0)) for i in range(on.size)]
    return types.SimpleNamespace(devices=np.array(places, object), size=on.size)


def test_the_training_step_is_accounted_for():
    on = mesh(fsdp=4)
    compiled = plan.compile_for(TINY, options(), on)
    found = rows(compiled, options(), on)
    assert compiled.facts["parameters"].endswith(" M")
    assert compiled.facts["global batch"] == "16 images, 4 a chip"
    assert compiled.images == 16
    done = float(found["compiled FLOPs a step"].split(", ")[1].split()[0])
    assert 0.9 < done < 1.1, "on CPU, without recomputation, the compiler does what the model asks for"
    assert "all-gather" in found["collectives a chip"]
    assert found["fits"].startswith("yes: ")
    assert float(found["estimated MFU"].rstrip("%")) > 0


def test_a_preview_has_to_fit_beside_the_state():
    """Six images on four chips: each draws two, with weights of its own, while its part of the optimiser's state waits."""
    stage = dataclasses.replace(TINY.generator, preview_every=5, preview_images=6)
    compiled = plan.compile_for(dataclasses.replace(TINY, generator=stage), options(), mesh(fsdp=4))
    params = sum(x.size * 4 for x in jax.tree.leaves(jax.eval_shape(plan.untrained(TINY)[0].init_params, jax.random.key(0))))
    assert compiled.preview > params + 2 * params / 4, "whole weights, a quarter of two moments"
    assert compiled.preview < 20 * params
    assert f", {compiled.preview / 1e9:.2f} GB during a preview" in compiled.verdict(LIMITS)
    assert compiled.verdict(dataclasses.replace(LIMITS, hbm=compiled.preview - 1)).startswith("NO: ")


def test_recomputing_shows_in_the_compiled_operations():
    net = TINY.generator.module
    deep = net.clone(backbone=net.backbone.clone(remat="full"))
    changed = dataclasses.replace(TINY, generator=dataclasses.replace(TINY.generator, module=deep))
    done = [
        rows(plan.compile_for(experiment, options(), mesh()), options(), mesh())["compiled FLOPs a step"].split(", ")[1]
        for experiment in (TINY, changed)
    ]
    assert float(done[1].split()[0]) > 1.15 * float(done[0].split()[0])


def test_the_tokenizers_step_can_be_planned():
    compiled = plan.compile_for(TINY, options(stage="tokenizer"), mesh())
    assert compiled.images == 8
    assert compiled.model > 0


def test_a_decoding_step_is_compared_with_what_it_has_to_read():
    asked = options(sample=True)
    compiled = plan.compile_for(TINY, asked, mesh())
    assert (compiled.steps, compiled.images) == (64, 2)
    width, tokens, rows_, codes = 32, 64, 4, 32  # two images, each with and without its condition
    weights = 2 * (3 * width * width + width * width + 3 * width * 64 + 2 * width) + width + width * codes
    assert compiled.step == 4 * (weights + 2 * 2 * rows_ * tokens * width + rows_ * codes)
    half = plan.compile_for(TINY, options(sample=True, segments=2), mesh())
    assert half.step == 4 * (weights + 2 * 2 * rows_ * 0.75 * tokens * width + rows_ * codes)
    assert "x weights, cache and logits" in rows(compiled, asked, mesh())["traffic of a decoding step"]


def test_a_program_too_large_is_told_and_a_setting_that_helps_is_found():
    devices = jax.devices()[:1]
    needed = sum(plan.compile_for(TINY, options(), mesh()).memory.values())
    small = dataclasses.replace(LIMITS, hbm=0.7 * needed)
    assert plan.compile_for(TINY, options(), mesh()).verdict(small).startswith("NO: ")
    found = plan.remedy(TINY, options(), devices, small)
    assert found.startswith("--generator."), found
    assert "(yes: " in found
    none = plan.remedy(TINY, options(), devices, dataclasses.replace(LIMITS, hbm=1.0))
    assert none.startswith("none of ")
    assert "--generator.optim.accumulate 2" in none


def test_batches_that_cannot_be_shared_are_refused():
    odd = dataclasses.replace(TINY, generator=dataclasses.replace(TINY.generator, batch=10))
    with pytest.raises(ValueError, match=r"generator.batch is 10, which mesh data 1 x fsdp 4 .* cannot share equally"):
        plan.compile_for(odd, options(), mesh(fsdp=4))
    with pytest.raises(ValueError, match="the config has no generator"):
        plan.compile_for(dataclasses.replace(TINY, generator=GeneratorStage()), options(sample=True), mesh())


def test_collectives_use_two_ports_of_every_torus_axis_they_span():
    places = [types.SimpleNamespace(coords=(x, y, 0)) for x in range(2) for y in range(4)]
    speed = plan.network(types.SimpleNamespace(devices=np.array(places, object)), LIMITS)
    assert speed([0, 1, 2, 3]) == 2 * LIMITS.link
    assert speed([0, 4]) == 2 * LIMITS.link
    assert speed(list(range(8))) == 4 * LIMITS.link


def test_slices_are_joined_by_the_data_centres_network():
    places = [types.SimpleNamespace(coords=(x, y, 0), slice_index=s) for s in range(2) for x in range(2) for y in range(2)]
    on = types.SimpleNamespace(devices=np.array(places, object))
    speed = plan.network(on, dataclasses.replace(LIMITS, dcn=3e9))
    assert speed([0, 1]) == 2 * LIMITS.link
    assert speed([0, 4]) == speed([]) == 3e9
    with pytest.raises(ValueError, match="invented does not say how fast slices are joined; plan one"):
        plan.network(on, LIMITS)


def test_chips_are_known_by_their_kind():
    def device(kind):
        return types.SimpleNamespace(device_kind=kind)

    assert chip(device("TPU v5 lite")) == CHIPS["TPU v5 lite"]
    assert chip(device("TPU v5p")) == CHIPS["TPU v5"]
    assert chip(device("NVIDIA A100-SXM4-80GB")).hbm == 80e9
    assert peak_flops(device("NVIDIA H100 80GB HBM3")) == 989e12
    assert peak_flops(device("NVIDIA H100 PCIe")) == 756e12
    assert chip(device("TPU v5e")) == CHIPS["TPU v5 lite"], "not a v5p, whose kind is TPU v5"
    assert chip(device("NVIDIA H100 80GB HBM3 MIG 1g.10gb")) is None, "part of a chip"
    assert peak_flops(jax.devices()[0]) is None
    assert unknown(jax.devices()[0]) == "no figures of cpu in ar_jax/machine/chips.py"


def test_figures_of_chips_are_of_the_right_size():
    for kind, known in CHIPS.items():
        assert 1e14 < known.flops < 5e15, kind
        assert 16e9 <= known.hbm <= 200e9, kind
        assert 100 < known.flops / known.bandwidth < 700, f"{kind}: operations a byte"


def test_a_slice_has_to_be_named():
    with pytest.raises(SystemExit, match="give at least one --topology"):
        plan.main(["configs/llamagen.py:mnist5k"])


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_the_tpu_compiler_its_installation_is_named():
    with pytest.raises(SystemExit, match=r"--topology v5e:2x2: .*pip install 'jax\[tpu\]'"):
        plan.main(["configs/llamagen.py:mnist5k", "--topology", "v5e:2x2"])


def test_a_program_that_another_release_wrote_names_the_one_that_fits(monkeypatch):
    def as_text():
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure in an async-update\nmore")

    monkeypatch.setattr(plan.metadata, "version", {"jaxlib": "1.2.3", "libtpu": "0.0.99"}.get)
    monkeypatch.setattr(plan, "_compiled", lambda *_: (types.SimpleNamespace(as_text=as_text), {}))
    said = r"jaxlib 1.2.3 cannot read the program that libtpu 0.0.99 made; pip install 'libtpu==\S+', which .* async-update\)"
    with pytest.raises(ValueError, match=said):
        plan.compile_for(TINY, options(), make_mesh(MeshShape(), jax.devices()[:1]))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (pip install jax[tpu])")
def test_a_slice_that_is_not_there_is_compiled_for():
    devices = plan.topology_devices("v5e:2x2")
    on = make_mesh(MeshShape(data=1, fsdp=4), devices)
    compiled = plan.compile_for(TINY, options(), on)
    assert "one by one" in plan.estimate(compiled, options(), on, chip(devices[0]))["at the chip's limits"]
