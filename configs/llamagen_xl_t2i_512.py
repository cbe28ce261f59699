"""LlamaGen-XL from text, stage 2: 512 pixels, 775M parameters, 32x32 tokens (arXiv:2406.06525).

    python -m ar_jax.convert vq_ds16_t2i.pt --to checkpoints/vq_ds16_t2i_512 --size 512
    python train.py configs/llamagen_xl_t2i_512.py --data.path IMAGES --data.text FEATURES.safetensors

IMAGES holds pictures and captions.jsonl; FEATURES holds `features` [N rows 2048] and `mask` [N rows] of a Flan-T5-XL
encoder, N in the order of the captions. The length of training is ours: none is published. Not reproduced: captions
replaced by short ones for three tenths of the draws.
"""

from _llamagen import text_conditional

from ar_jax.config import Experiment


def get_config() -> Experiment:
    return text_conditional(512, "data/aesthetic", steps=100000)
