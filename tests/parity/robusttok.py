"""RobustTok: perturbed latents and their plan."""

import jax
import jax.numpy as jnp
import numpy as np
from parity.common import fixed, nchw, nhwc

from ar_jax.tokenizers.quantize import VectorLoss, normalise, vector_quantise
from ar_jax.tokenizers.quantize_perturbed import annealed, perturb


def perturbation(folder):
    h, io = folder.h, folder.io
    (table,) = (folder.weights[key] for key in folder.weights)
    fixed(h, l2_normalised=True, codebook_size=len(table), codebook_dim=table.shape[1])
    features = nhwc(io["features"])
    places = features.shape[:-1]
    uniform, neighbour = (
        jnp.asarray(io["replace_uniform"]).reshape(places),
        jnp.asarray(io["neighbour"]).reshape(places),
    )
    readout = nhwc(jnp.linspace(-1, 1, features.size).reshape(nchw(features).shape))

    def made(features, table, alpha, beta):
        z, codes = normalise(features), normalise(table)
        quantised, index, losses = vector_quantise(z, codes, VectorLoss(commit=h["commitment_beta"]))
        return perturb(z, quantised, codes, uniform, neighbour, alpha, beta, h["delta"]), quantised, index, losses

    def objective(features, table):
        perturbed, _, _, losses = made(features, table, h["alpha"], h["beta"])
        return (perturbed * readout).sum() + losses["codebook"] + losses["commit"]

    @jax.jit
    def run(features, table):
        perturbed, quantised, index, losses = made(features, table, h["alpha"], h["beta"])
        grads = jax.grad(objective, argnums=(0, 1))(features, table)
        return {
            "quantized": nchw(quantised),
            "vq_loss": losses["codebook"],
            "commit_loss": losses["commit"],
            "indices": index,
            "perturbed": nchw(perturbed),
            "loss.grad.features": nchw(grads[0]),
            "loss.grad.embedding.weight": grads[1],
            "perturbed_all": nchw(made(features, table, 1.0, 1.0)[0]),
            "perturbed_none": nchw(made(features, table, 0.0, 1.0)[0]),
            "anneal": annealed(np.arange(0, 200, 5), 40, 120, 0.5),
        }

    return run(features, jnp.asarray(table))


CASES = {"robusttok_perturbation": perturbation}
