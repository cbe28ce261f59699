"""Search: candidates are judged by their previews while they are drawn, and the best are gone on with (`decode.search`).

python -m ar_jax.decode.judges --out checkpoints/judge_mnist5k.safetensors --data.name mnist5k --data.size 32
python sample.py RUN --sampling configs/sampling/search.py --decoder.beams 4 --decoder.candidates 8 --batch 4
python sample.py RUN --sampling configs/sampling/search.py --decoder.ahead 8          lookahead
python sample.py RUN --sampling configs/sampling/best_of.py --decoder.candidates 8    best of 8

The judge here knows digits. For another one give --decoder.judge.network.path, or a file like this one.
"""

import dataclasses

from ar_jax.decode.judges import ByClass, SmallNetwork
from ar_jax.decode.sampling import Sampling
from ar_jax.decode.search import Search


def get_sampling(own: Sampling) -> Sampling:
    judge = ByClass(SmallNetwork("checkpoints/judge_mnist5k.safetensors"))
    return dataclasses.replace(own, decoder=Search(judge, beams=4, candidates=8))
