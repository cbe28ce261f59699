r"""Codes without a codebook: FSQ (arXiv:2309.15505) and BSQ (arXiv:2406.07548), in the network of a VQGAN.

    python train.py configs/fsq.py:VARIANT
    python sample.py runs/mnist5k_fsq                      runs/mnist5k_bsq_fsq for the other

What ran here, and pictures: configs/README.md. Nothing was released in this form.

Small, for two CPU cores; both have the network, the generator and about the number of codes of llamagen.py:mnist5k:

    mnist5k          5,000 real digits; 8 x 6 x 5 = 240 codes (FSQ)
    mnist5k_bsq      the same with 2^8 = 256 codes (BSQ)

ImageNet, 256 pixels, as LlamaGen's VQ-16 is trained; the sizes of the papers' codebooks, in another network than theirs:

    variant          parameters   codes                        published
    vq16             72M          16x16 out of 64,000 (FSQ)    none in this network
    vq16_bsq         72M          16x16 of 18 bits (BSQ)       none in this network
"""

import dataclasses
from functools import partial

import jax.numpy as jnp
import llamagen

from ar_jax.config import Experiment
from ar_jax.tokenizers.fixed_codes import FixedCodes
from ar_jax.tokenizers.quantize_scalar import FSQ
from ar_jax.tokenizers.quantize_spherical import BSQ


def mnist5k(name: str, quantiser: FSQ | BSQ) -> Experiment:
    base = llamagen.mnist5k()
    module = FixedCodes(
        size=(32, 32), features=8, mult=(1, 2, 4), res_blocks=1, latent=32, quantiser=quantiser, groups=4
    )
    return dataclasses.replace(base, name=name, tokenizer=dataclasses.replace(base.tokenizer, module=module))


VARIANTS = {
    "mnist5k": partial(mnist5k, "mnist5k_fsq", FSQ((8, 6, 5))),
    "mnist5k_bsq": partial(mnist5k, "mnist5k_bsq_fsq", BSQ(8, joint=True)),
    "vq16": partial(
        llamagen.tokenizer, "fsq_vq16", FixedCodes(quantiser=FSQ((8, 8, 8, 5, 5, 5)), dtype=jnp.bfloat16)
    ),
    "vq16_bsq": partial(llamagen.tokenizer, "fsq_vq16_bsq", FixedCodes(quantiser=BSQ(18), dtype=jnp.bfloat16)),
}
