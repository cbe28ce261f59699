r"""VF prompt: the codes of a small picture of the image, then those of the image (readings of a paper's abstract).

    python train.py configs/vf_prompt.py:VARIANT
    python sample.py runs/vf_prompt_VARIANT                runs/mnist5k_vf_prompt and so on for the small ones

What ran here and pictures: configs/README.md.

Small, for two CPU cores:

    mnist5k           5,000 real digits, 4x4 codes of 16 pixels before 8x8 of 32, on the tokenizer of the quickstart
    mnist5k_random    the same network with a prompt of random codes, for comparison
    mnist5k_learned   the same network with a prompt of learned vectors, for comparison

ImageNet classes, 256 pixels, 4x4 codes of 64 pixels before 16x16; sizes and training are LlamaGen's:

    variant          parameters
    b_256            123M
    l_256            360M
    xl_256           796M
    xxl_256          1.4B
    3b_256           3.1B

Of "Autoregressive Image Generation with Vision Full-view Prompt" the abstract alone was at hand: tokens that say what the whole image
is come before those of its parts, in training and in sampling, and network and order stay as they are; FID on ImageNet then is
about a fifth lower than without, in several sizes. What the tokens are, it does not say: all variants are readings, and figures of the
paper are of no use beside them.

With LlamaGen's tokenizer, for images of two sizes:

    python -m ar_jax.convert vq_ds16_c2i.pt --family vf_prompt --scales 4 16 --to checkpoints/vq_ds16_c2i_prompt
    python -m ar_jax.tokenize checkpoints/vq_ds16_c2i_prompt --data.path data/imagenet \
        --crops 10 --scales 1.1 1.05 --out cache/imagenet_256_prompt
    python train.py configs/vf_prompt.py:b_256
    python sample.py runs/vf_prompt_b_256 --count 50000 --out b_256.npz

`--generator.module.prompt random` or `learned` trains a published size with another prompt, and `--tokenizer.module.prompt 2` a small one
with 2x2 codes; `sample.py RUN --generator.head.prompt-top-k 8` draws the prompt from fewer codes.
"""

import dataclasses
from functools import partial

import jax.numpy as jnp
import llamagen

from ar_jax.config import Experiment, TokenizerStage
from ar_jax.generators.vf_prompt import PromptCodes, Prompted
from ar_jax.nets.conditioning import Label
from ar_jax.nets.transformer import Transformer
from ar_jax.tokenizers.two_sizes import TwoSizes
from ar_jax.tokenizers.vqgan import VQGAN


def mnist5k(prompt: str = "codes") -> Experiment:
    base = llamagen.mnist5k()
    module = Prompted(
        Transformer(layers=4, width=128, heads=4, hidden=384), Label(128), PromptCodes(prompt_top_k=32), prompt=prompt
    )
    return dataclasses.replace(
        base,
        name="mnist5k" + f"_{prompt}" * (prompt != "codes") + "_vf_prompt",
        tokenizer=dataclasses.replace(base.tokenizer, module=TwoSizes(base.tokenizer.module, 4)),
        generator=dataclasses.replace(base.generator, module=module),
    )


def network(model: str) -> Prompted:
    """LlamaGen's transformer of a size, in bfloat16."""
    plain = llamagen.network(model, Label)
    head = PromptCodes(dtype=jnp.bfloat16, prompt_top_k=2048)
    return Prompted(plain.backbone, plain.conditioning, head, dropout=plain.dropout)


def class_conditional(model: str) -> Experiment:
    """ImageNet classes for 300 epochs, on the ten-crop codes of VQ-16."""
    base = llamagen.class_conditional(model, 256)
    return dataclasses.replace(
        base,
        name=f"vf_prompt_{model}_256",
        tokenizer=TokenizerStage(module=TwoSizes(VQGAN(), 4), path="checkpoints/vq_ds16_c2i_prompt"),
        generator=dataclasses.replace(base.generator, module=network(model), tokens="cache/imagenet_256_prompt"),
    )


VARIANTS = {
    "mnist5k": mnist5k,
    "mnist5k_random": partial(mnist5k, "random"),
    "mnist5k_learned": partial(mnist5k, "learned"),
    **{f"{model}_256": partial(class_conditional, model) for model in llamagen.SIZES},
}
