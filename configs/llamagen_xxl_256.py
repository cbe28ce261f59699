r"""LlamaGen-XXL, ImageNet classes, 256 pixels: 1.4B parameters, 16x16 tokens (arXiv:2406.06525).

    python -m ar_jax.convert vq_ds16_c2i.pt --to checkpoints/vq_ds16_c2i
    python -m ar_jax.tokenize checkpoints/vq_ds16_c2i --data.path data/imagenet/train \
        --crops 10 --scales 1.1 1.05 --out cache/imagenet_256
    python train.py configs/llamagen_xxl_256.py
    python sample.py runs/llamagen_xxl_256 --count 50000 --out xxl_256.npz

No published score at this size; 24x24 tokens (the config of 384 pixels) are what the paper reports.

One device does not hold the optimiser's state: add `--mesh.fsdp N` to split it over N.
"""

from _llamagen import class_conditional

from ar_jax.config import Experiment


def get_config() -> Experiment:
    return class_conditional("xxl", 256, guidance=1.75)
