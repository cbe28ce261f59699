"""Every variant of every config builds, parses, and has the published number of parameters; names find them."""

import collections
import dataclasses
import json
import math
import os
import pathlib
import re

import flax.linen as nn
import jax
import pytest

from ar_jax.config import CONFIGS, Experiment, keep_config, load_config, parse, run_file
from ar_jax.convert.sources import export, param_shapes
from ar_jax.data import Info
from ar_jax.files import codec
from ar_jax.tokens import TokenSpec, grid

ZOO = CONFIGS / "README.md"
READMES = sorted([CONFIGS.parent / "README.md", ZOO, *(CONFIGS.parent / "ar_jax").glob("*/README.md")])
ROOT = pathlib.Path(os.environ.get("AR_JAX_PARITY", pathlib.Path(__file__).parents[2] / "shared" / "parity"))
FAMILIES = {path.stem: vars(run_file(path)) for path in sorted(CONFIGS.glob("*.py"))}
VARIANTS = [f"configs/{family}.py:{variant}" for family, module in FAMILIES.items() for variant in module["VARIANTS"]]
IMAGENET = Info(classes=1000, captions=True, text="flan-t5-xl", text_rows=120, text_width=2048)
PUBLISHED = {  # variant -> manifest; the size of the image does not change the network
    "llamagen:vq16": "vq_ds16_c2i",
    "llamagen:vq8": "vq_ds8_c2i",
    "var:vq": "vae_ch160v4096z32",
    "flexvar:vq": "FlexVAE",
    "mar:kl16": "kl16",
    **{f"infinity:vae_d{bits}": f"infinity_vae_d{bits}" for bits in (16, 24, 32, 64)},
    **{f"elm:{name.replace('-', '_').lower()}": f"ELM-{name}" for name in ("L-1-16", "L-2-10", "XL-2-12", "2B-2-12")},
    "tokenbridge:l_256": "tokenbridge_large",
    "tokenbridge:h_256": "tokenbridge_huge",
    "infinity:vae_d56": "infinity_vae_d56_f8_14_patchify",
    "vqgan_lc:f16": "vqgan_lc_100K_f16",
    "instella:bae": "instella_bae",
    "dar:tokenizer": "D-AR-tokenizer_v1",
    "dar:l": "D-AR-L",
    "dar:xl": "D-AR-XL",
    **{f"detailflow:vq_{groups}": f"detailflow_tokenizer_{8 * groups}" for groups in (16, 32, 64)},
    **{f"detailflow:l_{groups}": f"detailflow_gpt_L_{8 * groups}" for groups in (16, 64)},
    "flextok:d12_d12": "flextok_d12_d12_in1k",
    "flextok:d18_d18": "flextok_d18_d18_in1k",
    "flextok:d18_d28": "flextok_d18_d28",
    "dqvae:features": "dqvae_dual_feature",
    "dqvae:entropy": "dqvae_dual_entropy",
    "dqvae:p6c18": "dq_transformer_class_p6c18",
    "vq_diffusion:imagenet": "vq_diffusion_imagenet_learnable",
    "rar:vq": "maskgit-vqgan-imagenet-f16-256",
    **{f"rar:{size}": f"rar_{size}" for size in ("b", "l", "xl", "xxl")},
    **{f"ibq:vq_{codes}": f"ibq_{codes}" for codes in (16384, 262144)},
    **{f"ibq:{size}": f"ibq_AR_{size.upper()}" for size in ("b", "l", "xl", "xxl")},
    "open_magvit2:vq_256": "openmagvit2_256_L",
    "open_magvit2:vq_128": "openmagvit2_128_L",
    **{f"open_magvit2:{size}": f"openmagvit2_AR_{size.upper()}" for size in ("b", "l", "xl")},
    **{
        f"fqgan:{name.lower()}": f"fqgan_{name}"
        for kind in ("dual", "triple")
        for name in (f"{kind}_ds16", f"{kind}_ds8", f"far_{kind}_B", f"far_{kind}_L")
    },
    **{f"gigatok:{size}": f"gigatok_VQ_{size.replace('_', '').upper()}256" for size in ("s_s", "s_b", "b_l", "xl_xxl")},
    **{f"gigatok:gpt_{size}": f"gigatok_GPT_{size.upper()}256" for size in ("b", "xl", "xxl")},
    **{
        f"titok:{name}": f"tokenizer_titok_{file}"
        for name, file in (
            *(("l_32", "l32"), ("b_64", "b64"), ("s_128", "s128"), ("l_32_logits", "l32"), ("b_64_logits", "b64")),
            *(("s_128_logits", "s128"), ("bl_64", "bl64_vq8k"), ("bl_128", "bl128_vq8k"), ("sl_256", "sl256_vq8k")),
        )
    },
    **{
        f"titok:ta_{name}": f"tatitok_{name.replace('_', '', 1)}"
        for name in ("bl_32_vq", "bl_64_vq", "bl_128_vq", "bl_32_vae", "bl_64_vae", "sl_128_vae")
    },
    **{f"titok:{name}_vae": f"titok_{name.replace('_', '')}_vae_c16" for name in ("ll_32", "bl_64", "bl_128")},
    **{"hita:v": "hita_tok", "hita:u": "hita_ultra"},
    **{f"hita:{size}": f"hita_gpt_{size.upper()}" for size in ("b", "l", "xl", "xxl", "2b")},
    **{f"nar:{size}_256": f"nar_c2i_{size.upper()}_256" for size in ("b", "m", "l", "xl")},
    **{f"nar:xl_t2i_{size}": f"nar_t2i_XL_{size}" for size in (256, 512)},
    **{f"mar:{size}_256": f"MAR-{size.upper()}" for size in "blh"},
    **{f"var:d{depth}": f"var_d{depth}" for depth in (16, 20, 24, 30, 36)},
    "flexvar:d16": "FlexVARd16-epo179",
    "flexvar:d20": "FlexVARd20-epo249",
    "flexvar:d24": "FlexVARd24-epo349",
    **{f"hmar:d{depth}{part}": f"hmar-d{depth}" for depth in (16, 20, 24, 30) for part in ("", "_masks")},
    **{f"flowar:{size}_256": f"FlowAR-{size.upper()}" for size in "slh"},
    "fractal:ar_64": "fractalar_in64",
    "fractal:mar_64": "fractalmar_in64",
    **{f"fractal:{size[0]}_256": f"fractalmar_{size}_in256" for size in ("base", "large", "huge")},
    **{f"xar:{size}_256": f"xAR-{size.upper()}" for size in "blh"},
    "llamagen:xl_t2i_256": "t2i_XL_stage1_256",
    "llamagen:xl_t2i_512": "t2i_XL_stage2_512",
    **{
        f"llamagen:{size}_{side}": f"c2i_{size.upper()}_384"
        for size in ("b", "l", "xl", "xxl", "3b")
        for side in (256, 384)
    },
}
# one file each before there were variants; README named them
BEFORE = """
emoji_llamagen fashion_mnist_llamagen fashion_mnist_var flexvar_d16 flexvar_d20 flexvar_d24 flexvar_vq flowar_h_256
flowar_l_256 flowar_s_256 givt_causal_256 givt_maskgit_256 givt_vae hmar_d16 hmar_d16_masks hmar_d20 hmar_d20_masks
hmar_d24 hmar_d24_masks hmar_d30 hmar_d30_masks llamagen_3b_256 llamagen_3b_384 llamagen_b_256 llamagen_b_384
llamagen_l_256 llamagen_l_384 llamagen_vq16 llamagen_vq8 llamagen_xl_256 llamagen_xl_384 llamagen_xl_t2i_256
llamagen_xl_t2i_512 llamagen_xxl_256 llamagen_xxl_384 mar_b_256 mar_h_256 mar_kl16 mar_l_256 mnist5k_causal_flow
mnist5k_flexvar mnist5k_flowar mnist5k_givt mnist5k_hmar mnist5k_llamagen mnist5k_mar mnist5k_var mnist5k_xar var_d16
var_d20 var_d24 var_d30 var_d36 var_vq xar_b_256 xar_h_256 xar_l_256
"""
OWN = """
import llamagen
VARIANTS = {"digits": llamagen.mnist5k, "letters": llamagen.emoji}
"""

each = pytest.mark.parametrize("name", VARIANTS, ids=lambda name: name.removeprefix("configs/"))


def short(name):
    return name.removeprefix("configs/").replace(".py", "")


def networks(experiment):
    """The networks a config trains, complete for images of its size."""
    tokenizer, generator = experiment.tokenizer.module, experiment.generator.module
    if tokenizer is None:  # converted from a release: VQ-16
        side = experiment.data.size // 16
        spec = TokenSpec(grid(side, side), codes=(16384,))
    else:
        spec = tokenizer.spec
        if not experiment.tokenizer.path:
            yield "tokenizer", tokenizer
    if generator is not None:
        yield "generator", generator.complete(spec, IMAGENET)


@each
def test_config_builds(name):
    experiment = load_config(name)
    assert isinstance(experiment, Experiment)
    family, variant = short(name).split(":")
    assert experiment.name in (f"{family}_{variant}", f"{variant}_{family}")
    found = dict(networks(experiment))
    assert found
    for module in found.values():
        shapes = param_shapes(module)
        assert all(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
        written = codec.encode(module)
        assert codec.encode(codec.decode(written, nn.Module)) == written
    if "tokenizer" in found:
        assert found["tokenizer"].size == (experiment.data.size,) * 2


@pytest.mark.parametrize("name", PUBLISHED)
def test_config_has_the_published_size(name):
    manifest = ROOT / "manifests" / f"{PUBLISHED[name]}.json"
    if not manifest.exists():
        pytest.skip(f"no manifest at {manifest}; set AR_JAX_PARITY")
    content = json.loads(manifest.read_text())
    ((kind, module),) = (pair for pair in networks(load_config(name)) if param_shapes(pair[1]))
    found = export(module, kind)
    keys, beside = {key: tuple(shape) for key, shape in content["keys"].items()}, getattr(found.source, "BESIDE", ())
    others = {key: keys.pop(key) for key in list(keys) if key.startswith(beside)}
    assert {**found.keys, **found.buffers} == keys
    assert found.trained == content["num_params"] - sum(map(math.prod, others.values()))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_of_a_family_has_a_line_for_every_variant_and_says_how_it_is_run(family):
    head = FAMILIES[family]["__doc__"]
    assert f"    python train.py configs/{family}.py:VARIANT\n" in head
    lines = re.findall(r"^    (\w+) {3,}\S.*$", head, re.MULTILINE)
    assert [line for line in lines if line != "variant"] == list(FAMILIES[family]["VARIANTS"])
    for named, variant in re.findall(r"configs/(\w+)\.py:(\w+)", head):
        assert variant == "VARIANT" or variant in FAMILIES[named]["VARIANTS"]


def stated(text):
    return set(re.findall(r"\b(?:r?FID|IS) \d+\.\d+", text))


def figures(text):
    """Published ones, and numbers of parameters."""
    return stated(text) | set(re.findall(r"(?<![\w.])\d+(?:\.\d+)?[MB]\b", text))


def test_the_zoo_has_a_row_for_every_variant_with_the_figures_of_its_header_and_names_no_other():
    zoo = ZOO.read_text()
    for family, variant in re.findall(r"\b(\w+)\.py:(\w+)", zoo):
        assert variant in FAMILIES[family]["VARIANTS"], f"{family}.py:{variant}"
    sections = re.findall(r"^## (.*)$", zoo, re.MULTILINE)
    listed = re.findall(r"^\| \[([^]]+)\]\(#\S+\) \|", zoo, re.MULTILINE)
    assert [name for name in sections if name in listed] == listed == sorted(listed, key=str.lower)
    rows = collections.defaultdict(str)
    for family, variant, row in re.findall(r"^\| `(\w+)\.py:(\w+)` \|(.*)$", zoo, re.MULTILINE):
        rows[family, variant] += row
    for family, module in FAMILIES.items():
        head = re.sub(r"\n {20,}", " ", module["__doc__"])
        for variant in module["VARIANTS"]:
            (line,) = re.findall(rf"^    {variant} {{3,}}\S.*$", head, re.MULTILINE)
            assert rows[family, variant], f"{family}.py:{variant} has no row"
            named = {part.split("\n")[0] for part in zoo.split("\n## ") if f"| `{family}.py:{variant}` |" in part}
            assert named & {*listed}, f"{named} is not in the table of families"
            assert figures(line) <= figures(rows[family, variant]), f"{family}.py:{variant}"
            assert not stated(rows[family, variant]) - stated(line), f"{family}.py:{variant}"


@pytest.mark.parametrize("file", READMES, ids=lambda file: str(file.relative_to(CONFIGS.parent)))
def test_links_of_the_readmes_lead_somewhere(file):
    def anchors(of):
        titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", of.read_text(), flags=re.DOTALL), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}

    links = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", file.read_text())
    assert links
    for link in map("".join, links):
        if not re.match(r"https?:", link):
            path, _, anchor = link.partition("#")
            target = file.parent / path if path else file
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@each
def test_overrides_are_parsed(name, capsys):
    experiment = load_config(name)
    changed = parse(experiment, ["--generator.batch", "8", "--data.size", "64"], "train.py", "")
    assert (changed.generator.batch, changed.data.size) == (8, 64)
    tokenizer = experiment.tokenizer.module
    if "size" in getattr(tokenizer, "__dataclass_fields__", ()):
        tokenizer = tokenizer.clone(size=(64, 64))  # follows the data
    assert changed.tokenizer == dataclasses.replace(experiment.tokenizer, module=tokenizer)
    with pytest.raises(SystemExit) as stop:
        parse(experiment, ["--help"], "train.py", "")
    assert stop.value.code == 0
    assert "--generator.optim.lr" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parse(experiment, ["--generator.bach", "8"], "train.py", "")
    assert "--generator.batch" in capsys.readouterr().err


def test_every_published_config_is_there():
    assert PUBLISHED.keys() <= set(map(short, VARIANTS))


def test_a_family_without_a_variant_lists_them_and_an_unknown_one_is_refused_with_the_near_names():
    with pytest.raises(
        ValueError, match=r"^configs/var\.py has variants: .*; give one, such as configs/var\.py:mnist5k\n"
    ) as said:
        load_config("configs/var.py")
    assert FAMILIES["var"]["__doc__"].strip() in str(said.value)
    with pytest.raises(ValueError, match=r"configs/var\.py has no variant 'd6'; near names are d36, d16"):
        load_config("configs/var.py:d6")
    with pytest.raises(ValueError, match=r"var has no variant '\?'; there are mnist5k, fashion_mnist, emoji, vq, d16"):
        load_config("var:?")


def test_names_of_single_files_are_refused_with_the_name_of_the_variant():
    assert len(BEFORE.split()) == 57
    for old in BEFORE.split():
        with pytest.raises(
            ValueError, match=rf"^configs/{old}\.py is a variant now: give configs/\w+\.py:\w+$"
        ) as said:
            load_config(f"configs/{old}.py")
        assert load_config(str(said.value).split()[-1]).name == old
    with pytest.raises(ValueError, match=r"'configs/llamagen_tiny\.py' is no config file; give a file such as"):
        load_config("configs/llamagen_tiny.py")


def test_published_configs_are_found_from_elsewhere_unless_there_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = "llamagen:mnist5k", "llamagen.py:mnist5k", "configs/llamagen.py:mnist5k", f"{CONFIGS}/llamagen.py:mnist5k"
    assert {load_config(name).name for name in names} == {"mnist5k_llamagen"}
    (tmp_path / "llamagen.py").write_text("VARIANTS = {'mnist5k': lambda: 'own'}")
    assert (load_config("llamagen.py:mnist5k"), load_config("llamagen:mnist5k").name) == ("own", "mnist5k_llamagen")
    with pytest.raises(ValueError, match="is no config file"):
        load_config("elsewhere/llamagen.py:mnist5k")


def test_an_own_family_builds_on_the_published_ones_and_its_copy_in_a_run_folder_is_the_variant(tmp_path):
    (tmp_path / "own:1.py").write_text(OWN)
    assert load_config(f"{tmp_path}/own:1.py:digits") == load_config("llamagen:mnist5k")
    copy = tmp_path / "config.py"
    keep_config(f"{tmp_path}/own:1.py:letters", copy)
    assert load_config(str(copy)).name == load_config(f"{copy}:letters").name == "emoji_llamagen"
    before = copy.read_text()
    keep_config(f"{copy}:letters", copy)
    assert copy.read_text() == before
    with pytest.raises(
        ValueError, match=r"own:1\.py has variants: digits, letters; give one, such as .*own:1\.py:digits$"
    ):
        load_config(f"{tmp_path}/own:1.py")
