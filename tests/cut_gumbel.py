"""What becomes of probabilities that are drawn with Gumbel noise which has an end."""

import numpy as np


def cut(p, largest):
    """Probabilities of the entries that are largest with noise up to `largest` added to log p; float64.

    Sorted upwards with pi_0 = 0, e = exp(-largest) and S_i the sum from i on: of b_i = (exp(e (K+1-i) - e S_i / pi_i) -
    exp(e (K+1-i) - e S_i / pi_{i-1})) / S_i, entry n has pi_n (b_1 + ... + b_n).
    Source: of the effect, arXiv:2409.02908.
    """
    order = np.argsort(p)
    pi, e, count = p[order], np.exp(-largest), np.arange(len(p), 0, -1)
    rest = np.cumsum(pi[::-1])[::-1]
    before = np.append(np.inf, 1 / pi[:-1])
    b = (np.exp(e * (count - rest / pi)) - np.exp(e * (count - rest * before))) / rest
    found = np.empty_like(p)
    found[order] = pi * np.cumsum(b)
    return found
