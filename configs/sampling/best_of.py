"""Images are drawn to the end, and of several a judge takes the best (`decode.search.BestOf`); see `search.py` for the judge.

python sample.py RUN --sampling configs/sampling/best_of.py --decoder.candidates 8 --batch 4
"""

import dataclasses

from ar_jax.decode.judges import ByClass, SmallNetwork
from ar_jax.decode.sampling import Sampling
from ar_jax.decode.search import BestOf


def get_sampling(own: Sampling) -> Sampling:
    judge = ByClass(SmallNetwork("checkpoints/judge_mnist5k.safetensors"))
    return dataclasses.replace(own, decoder=BestOf(8, judge))
