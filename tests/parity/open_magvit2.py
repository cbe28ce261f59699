"""Open-MAGVIT2: the lookup-free tokenizer."""

import jax
import jax.numpy as jnp
import numpy as np
from parity.common import fixed, loaded, nchw, nhwc

from ar_jax.convert import open_magvit2 as source
from ar_jax.convert.names import to_weights
from ar_jax.nets import patchgan as gan
from ar_jax.tokenizers.lookup_free import LookupFree
from ar_jax.tokenizers.quantize_lookup_free import SignLoss, sign_entropies, sign_quantise


def vq(folder):
    h, io = folder.h, folder.io
    loss = SignLoss(
        entropy=h["entropy_weight"] * h["sample_minimization_weight"], commit=h["commitment_weight"],
        temperature=h["entropy_temperature"], even=h["batch_maximization_weight"] / h["sample_minimization_weight"],
    )  # fmt: skip
    whole = LookupFree(
        size=folder.shape("image")[2:], features=h["base_channels"], mult=tuple(h["ch_mult"]),
        res_blocks=h["num_res_blocks"], bits=(h["codebook_dim"],), groups=h["norm_num_groups"], lfq=loss,
        channels=folder.shape("image")[1],
    )  # fmt: skip
    factorised = whole.clone(bits=tuple(h["factor_bits"]))
    fixed(h, downsample=whole.downsample, norm_eps=1e-6)
    params, _ = loaded(whole, folder.weights, source)
    codes = jnp.asarray(io["codes"])[..., None]
    pair = jnp.stack([io["codes_pre"], io["codes_post"]], axis=-1)

    @jax.jit
    def run(params, image, features, codes, pair):
        def call(method, *args, module=whole):
            return module.apply({"params": params}, *args, method=method)

        def tokens(latents, module):
            return call("quantise", latents, module=module)[1].reshape(len(latents), whole.spec.n, -1)

        def maps(signs):
            return nchw(signs.reshape(len(signs), *whole.grid, -1))

        def train(params):
            made, losses, seen = whole.apply({"params": params}, image, method="autoencode")
            return jnp.abs(image - made).mean() + sum(losses.values()), (made, seen)

        def auxiliary(z):
            losses = sign_quantise(z, whole.bits, loss)[2]
            return sum(losses.values()), losses

        (value, (made, seen)), grads = jax.value_and_grad(train, has_aux=True)(params)
        (aux, losses), aux_grad = jax.value_and_grad(auxiliary, has_aux=True)(features)
        sample, batch = sign_entropies(features, loss.temperature)
        both = call("embed", codes), call("embed", pair, module=factorised)
        images = jnp.split(nchw(call("decode", jnp.concatenate(both))), [len(codes)])
        halves = tokens(seen["latents"], factorised)
        found = {
            "latent": nchw(seen["latents"]),
            "quantized": maps(call("embed", seen["tokens"])),
            "indices": seen["tokens"],
            "indices_pre": halves[..., 0],
            "indices_post": halves[..., 1],
            "recon": nchw(made),
            "code_quantized": maps(both[0]),
            "code_image": images[0],
            "factor_quantized": maps(both[1]),
            "factor_image": images[1],
            "per_sample_entropy": sample,
            "codebook_entropy": batch,
            "entropy_loss": losses["entropy"] / h["entropy_weight"],
            "commitment": losses["commit"] / h["commitment_weight"],
            "aux_loss": aux,
            "aux_loss.grad": nchw(aux_grad),
            "train_loss": value,
        }
        return found, grads

    found, grads = run(params, nhwc(io["image"]), nhwc(io["features"]), codes, pair)
    return found | gradients(folder, whole, grads) | adversarial(nhwc(io["logits_real"]), nhwc(io["logits_fake"]))


def gradients(folder, module, grads, family=source, word="", loss="train_loss"):
    """Those that a folder asks for, under their names; `word` stands before the names of the family's files."""
    named = to_weights(jax.tree.map(np.asarray, grads), family.rules(module))
    return {f"{loss}.grad.{name}": named[word + name] for name in folder.outputs(f"{loss}.grad.")}


def adversarial(real, fake):
    first, average = gan.lecam(real, fake, jnp.zeros(2))
    _, average = gan.lecam(3 * fake, 2 * real, average)
    second, _ = gan.lecam(real, fake, average, decay=1.0)
    return {
        "gen_loss": gan.averaged_generator(fake),
        "disc_hinge": gan.hinge_discriminator(real, fake),
        "disc_non_saturating": gan.averaged_discriminator(real, fake),
        "lecam_first": first,
        "lecam_second": second,
        "lecam_ema": average,
    }


CASES = {"openmagvit2_vq": vq}
