r"""LlamaGen-B, ImageNet classes, 256 pixels: 111M parameters, 16x16 tokens (arXiv:2406.06525).

    python -m ar_jax.convert vq_ds16_c2i.pt --to checkpoints/vq_ds16_c2i
    python -m ar_jax.tokenize checkpoints/vq_ds16_c2i --data.path data/imagenet/train \
        --crops 10 --scales 1.1 1.05 --out cache/imagenet_256
    python train.py configs/llamagen_b_256.py
    python sample.py runs/llamagen_b_256 --count 50000 --out b_256.npz

Published: FID 5.46 (16x16 tokens), 50,000 samples.
"""

from _llamagen import class_conditional

from ar_jax.config import Experiment


def get_config() -> Experiment:
    return class_conditional("b", 256, guidance=2.0)
