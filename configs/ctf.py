r"""CTF, coarse-to-fine token prediction: clusters of codes one after the other, then all codes at once (arXiv:2503.16194).

    python train.py configs/ctf.py:VARIANT
    python sample.py runs/ctf_VARIANT                      runs/mnist5k_ctf for the small one

What ran here and pictures: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits: 64 clusters one by one, then 64 codes; the quickstart's tokenizer

ImageNet classes, 256 pixels, 512 clusters of LlamaGen's 16,384 codes:

    variant          parameters   published
    b_256            142M         figures only
    l_256            482M         figures only
    xl_256           1.1B         figures only
    xxl_256          2.1B         figures only

The clusters come first, of a trained tokenizer:

    python train.py configs/llamagen.py:mnist5k
    python -m ar_jax.codebook configs/ctf.py:mnist5k --base runs/mnist5k_llamagen --out checkpoints/clusters_mnist5k
    python train.py configs/ctf.py:mnist5k

    python -m ar_jax.convert vq_ds16_c2i.pt --to checkpoints/vq_ds16_c2i
    python -m ar_jax.codebook configs/ctf.py:b_256 --base checkpoints/vq_ds16_c2i --out checkpoints/clusters_512
    python -m ar_jax.tokenize checkpoints/clusters_512 --data.path data/imagenet \
        --crops 10 --scales 1.1 1.05 --out cache/imagenet_clusters
    python train.py configs/ctf.py:b_256

No code or weights are published. The abstract says what is coarse and what is fine; the number of clusters, the size of the second
network (half the layers), the wrong clusters that it is told in training, and that both are trained together, are ours.
"""

import dataclasses
from functools import partial

import jax.numpy as jnp
import llamagen

from ar_jax.config import Experiment, Sampling, TokenizerStage
from ar_jax.decode.guidance import Interval
from ar_jax.decode.temperature import Constant
from ar_jax.generators.coarse_to_fine import CoarseFirst, CoarseToFine
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.conditioning import Label
from ar_jax.nets.transformer import Transformer
from ar_jax.tokenizers.clustered import Clustered
from ar_jax.tokenizers.vqgan import VQGAN

VQ16 = VQGAN(mult=(1, 1, 2, 2, 4), dtype=jnp.bfloat16)


def mnist5k() -> Experiment:
    base = llamagen.mnist5k()
    net = {"width": 128, "heads": 4, "hidden": 384}
    module = CoarseToFine(Transformer(4, **net), Label(128), fine=Transformer(2, **net), clusters=32)
    return dataclasses.replace(
        base,
        name="mnist5k_ctf",
        tokenizer=TokenizerStage(module=Clustered(base.tokenizer.module, 32), path="checkpoints/clusters_mnist5k"),
        generator=dataclasses.replace(
            base.generator, module=module, order=CoarseFirst(), sampling=Sampling(Interval(2.5), Constant(0.9))
        ),
    )


def class_conditional(model: str) -> Experiment:
    """LlamaGen's training, of two networks."""
    base = llamagen.class_conditional(model, 256)
    network = base.generator.module
    module = CoarseToFine(
        network.backbone, network.conditioning, Categorical(dtype=jnp.bfloat16), dropout=0.1,
        fine=network.backbone.clone(layers=network.backbone.layers // 2), fine_head=Categorical(dtype=jnp.bfloat16),
    )  # fmt: skip
    return dataclasses.replace(
        base,
        name=f"ctf_{model}_256",
        tokenizer=TokenizerStage(module=Clustered(VQ16), path="checkpoints/clusters_512"),
        generator=dataclasses.replace(
            base.generator, module=module, order=CoarseFirst(), tokens="cache/imagenet_clusters",
            sampling=Sampling(Interval(2.0)),
        ),
    )  # fmt: skip


VARIANTS = {
    "mnist5k": mnist5k,
    **{f"{model}_256": partial(class_conditional, model) for model in ("b", "l", "xl", "xxl")},
}
