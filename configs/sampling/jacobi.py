"""Windows of tokens guessed and corrected together: the same tokens in fewer network calls (`decode.jacobi`).

python sample.py RUN --sampling configs/sampling/jacobi.py --decoder.window 32
python -m ar_jax.bench sample RUN --sampling configs/sampling/jacobi.py       calls and time beside one token at a time
"""

import dataclasses

from ar_jax.decode.jacobi import Jacobi
from ar_jax.decode.sampling import Sampling


def get_sampling(own: Sampling) -> Sampling:
    return dataclasses.replace(own, decoder=Jacobi())
