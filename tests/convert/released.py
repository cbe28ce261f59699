"""What the tests of released checkpoints share: which there are, their keys, tiny ones with weights."""

import json
import os
import pathlib
from collections import OrderedDict

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_reader import Storage, Tensor, save

from ar_jax.config import load_config
from ar_jax.convert.__main__ import main, to_folder
from ar_jax.convert.sources import export, identify
from ar_jax.files import codec

ROOT = pathlib.Path(os.environ.get("AR_JAX_PARITY", pathlib.Path(__file__).parents[3] / "shared" / "parity"))

# The manifests of the families that stand: family -> names of tokenizers, names of generators.
FAMILIES = {
    "llamagen": (
        ("vq_ds16_c2i", "vq_ds16_t2i", "vq_ds8_c2i"),
        (
            *("c2i_B_256", "c2i_B_384", "c2i_L_256", "c2i_L_384", "c2i_XL_384", "c2i_XXL_384", "c2i_3B_384"),
            *("t2i_XL_stage1_256", "t2i_XL_stage2_512"),
        ),
    ),
    "vf_prompt": ((), ()),  # reads LlamaGen's tokenizers
    "var": (("vae_ch160v4096z32",), ()),
    "flexvar": (("FlexVAE",), ()),
    "nar": ((), (*(f"nar_c2i_{size}_256" for size in ("B", "M", "L", "XL")), "nar_t2i_XL_256", "nar_t2i_XL_512")),
    "next_scale": (
        (),
        (
            *("var_d16", "var_d20", "var_d24", "var_d30", "var_d36"),
            *("FlexVARd16-epo179", "FlexVARd20-epo249", "FlexVARd24-epo349"),
            *("hmar-d16", "hmar-d20", "hmar-d24", "hmar-d30"),
        ),
    ),
    "lightgen": ((), ("lightgen_large",)),
    "fractal": (
        (),
        (
            *("fractalar_in64", "fractalmar_in64"),
            *("fractalmar_base_in256", "fractalmar_large_in256", "fractalmar_huge_in256"),
        ),
    ),
    "mar": (("kl16",), ("MAR-B", "MAR-L", "MAR-H")),
    "himar": ((), ("Hi-MAR-B", "Hi-MAR-L", "Hi-MAR-H")),
    "flowar": ((), ("FlowAR-S", "FlowAR-L", "FlowAR-H")),
    "xar": ((), ("xAR-B", "xAR-L", "xAR-H")),
    "binary_latent": (("bld_ae_c64", "ELM-bae-16", "ELM-bae-20", "ELM-bae-24"), ("bld_churches_c64",)),
    "elm": ((), ("ELM-L-1-16", "ELM-L-2-10", "ELM-XL-2-12", "ELM-2B-2-12")),
    "tokenbridge": ((), ("tokenbridge_large", "tokenbridge_huge")),
    "infinity": (tuple(f"infinity_vae_{name}" for name in ("d16", "d24", "d32", "d64", "d56_f8_14_patchify")), ()),
    "fqgan": (
        tuple(f"fqgan_{kind}_{size}" for kind in ("dual", "triple") for size in ("ds8", "ds16")),
        tuple(f"fqgan_far_{kind}_{size}" for kind in ("dual", "triple") for size in "BL"),
    ),
    "titok": (
        (
            *("tokenizer_titok_l32", "tokenizer_titok_b64", "tokenizer_titok_s128"),
            *("tokenizer_titok_bl64_vq8k", "tokenizer_titok_bl128_vq8k", "tokenizer_titok_sl256_vq8k"),
            *("titok_ll32_vae_c16", "titok_bl64_vae_c16", "titok_bl128_vae_c16"),
            *("tatitok_bl32_vq", "tatitok_bl64_vq", "tatitok_bl128_vq"),
            *("tatitok_bl32_vae", "tatitok_bl64_vae", "tatitok_sl128_vae"),
        ),
        (),
    ),
    "vqgan_lc": (("vqgan_lc_100K_f16",), ()),
    "flextok": (("flextok_d12_d12_in1k", "flextok_d18_d18_in1k", "flextok_d18_d28"), ()),
    "hita": (("hita_tok", "hita_ultra"), tuple(f"hita_gpt_{size}" for size in ("B", "L", "XL", "XXL", "2B"))),
    "gigatok": (
        tuple(f"gigatok_VQ_{size}256" for size in ("SS", "SB", "BL", "XLXXL")),
        tuple(f"gigatok_GPT_{size}256" for size in ("B", "XL", "XXL")),
    ),
    "detailflow": (
        tuple(f"detailflow_tokenizer_{tokens}" for tokens in (128, 256, 512)),
        tuple(f"detailflow_gpt_L_{tokens}" for tokens in (128, 512)),
    ),
    "dar": (("D-AR-tokenizer_v1",), ("D-AR-L", "D-AR-XL")),
    "dqvae": (("dqvae_dual_feature", "dqvae_dual_entropy"), ("dq_transformer_class_p6c18",)),
    "instella": (("instella_bae",), ("instella_ar", "instella_diffusion")),
    "halton": (
        (),
        tuple(f"halton_maskgit_{name}" for name in ("256_tiny", "256_small", "256_base", "384_small", "384_base", "384_large")),
    ),
    "vq_diffusion": (
        (),
        tuple(f"vq_diffusion_{name}" for name in ("coco", "coco_learnable", "ithq", "imagenet", "imagenet_learnable")),
    ),
    "flashar": ((), ()),  # its names stand in its parity folder
    "rar": (("maskgit-vqgan-imagenet-f16-256",), ("rar_b", "rar_l", "rar_xl", "rar_xxl")),
    "meissonic": ((), ("meissonic_1024",)),
    "maskgit": ((), ("generator_titok_l32", "generator_titok_b64", "generator_titok_s128")),
    "ibq": (("ibq_16384", "ibq_262144"), ("ibq_AR_B", "ibq_AR_L", "ibq_AR_XL", "ibq_AR_XXL")),
    "open_magvit2": (
        ("openmagvit2_128_L", "openmagvit2_256_L"),
        ("openmagvit2_AR_B", "openmagvit2_AR_L", "openmagvit2_AR_XL"),
    ),
}
# Checkpoints of other methods that have every key and shape of one of these, so that nothing in the file tells them apart.
TWINS = {"D-AR-L": "c2i_L_256", "D-AR-XL": "c2i_XL_384"}


def names(family):
    """Of its manifests."""
    return [name for kind in FAMILIES[family] for name in kind]


def released(name):
    """A manifest, and the shapes of its keys."""
    path = ROOT / "manifests" / f"{name}.json"
    if not path.exists():
        pytest.skip(f"no manifest at {path}; set AR_JAX_PARITY")
    content = json.loads(path.read_text())
    return content, {key: tuple(shape) for key, shape in content["keys"].items()}


def generator_of(name, variant, buffers=()):
    """A released checkpoint is the generator of a variant "family:name" of the configs, drawn as that says.

    Returns:
      What was found, the config's generator, the sentence about it, and what it knows of its data.
    """
    (content, shapes), experiment = released(name), load_config(variant)
    found, stage = identify(shapes), experiment.generator
    assert (found.family, found.kind) == (variant.split(":")[0], "generator")
    assert ({**found.keys, **found.buffers}, set(found.buffers)) == (shapes, set(buffers))
    assert found.trained == content["num_params"]
    words, info, settings = found.source.describe(found.module)
    ours = stage.module.complete((experiment.tokenizer.module or found.module).spec, info)
    assert export(ours, "generator", found.family).keys == found.keys
    assert settings == {"order": codec.encode(stage.order), "sampling": codec.encode(stage.sampling)}
    return found, ours, words, info


def weights_of(folder):
    """The weights of a parity folder."""
    if not ROOT.exists():
        pytest.skip(f"no fixtures at {ROOT}; set AR_JAX_PARITY")
    return load_file(ROOT / folder / "weights.safetensors")


def torch_file(path, weights):
    """What torch.save({"model": weights}) writes."""
    tensors, storages = OrderedDict(), {}
    kinds = {"float32": "FloatStorage", "bfloat16": "BFloat16Storage"}
    for i, (key, value) in enumerate(weights.items()):
        strides = tuple(int(np.prod(value.shape[axis + 1 :])) for axis in range(value.ndim))
        storage = Storage(str(i), kinds[str(value.dtype)])
        tensors[key] = Tensor(storage, 0, value.shape, strides, False, OrderedDict())
        storages[str(i)] = value
    return save(path, {"model": tensors, "steps": 3}, storages)


def assert_same(found, want):
    assert found.keys() == want.keys()
    for key, value in want.items():
        assert found[key].dtype == value.dtype, key
        np.testing.assert_array_equal(found[key], value, err_msg=key)


def change(weights, key, value):
    """The weights with another entry, or without it if it is None."""
    changed = {**weights, key: value}
    return {key: value for key, value in changed.items() if value is not None}


def there_and_back(folder, weights, *options):
    """A file becomes a model folder and a file again, as the commands make them, and no bit changes."""
    save_file(weights, folder / "a.safetensors")
    main([str(folder / "a.safetensors"), "--to", str(folder / "model"), *options])
    main([str(folder / "model"), "--back", str(folder / "back.safetensors")])
    assert_same(load_file(folder / "back.safetensors"), weights)


def refused(folder, weights, message, **settings):
    """A file is refused in this sentence, and nothing is left behind."""
    save_file(weights, folder / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        to_folder(folder / "a.safetensors", folder / "model", **settings)
    assert [path.name for path in folder.iterdir()] == ["a.safetensors"]
