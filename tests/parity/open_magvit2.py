"""Open-MAGVIT2: the lookup-free tokenizer and the generator of factorised tokens."""

import jax
import jax.numpy as jnp
import numpy as np
from parity.common import along, draws, fixed, loaded, nchw, nhwc

from ar_jax.convert import open_magvit2 as source
from ar_jax.convert.names import to_weights
from ar_jax.data import Info
from ar_jax.decode.guidance import BySubCode
from ar_jax.decode.sampling import Sampling
from ar_jax.decode.temperature import BySubCode as Temperatures
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import Previous
from ar_jax.heads.factorised import Factorised
from ar_jax.nets import patchgan as gan
from ar_jax.nets.conditioning import Label
from ar_jax.nets.transformer import Transformer
from ar_jax.orders import raster
from ar_jax.tokenizers.lookup_free import LookupFree
from ar_jax.tokenizers.quantize_lookup_free import SignLoss, sign_entropies, sign_quantise
from ar_jax.tokens import TokenSpec, grid


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


def build(folder):
    """The generator and its parameters; in released files a word stands before all names."""
    h, width = folder.h, folder.h["dim"]
    multiple = h["ffn_multiple_of"]
    net = {
        "width": width, "heads": h["heads"], "hidden": -(-(8 * width // 3) // multiple) * multiple, "dropout": 0.1,
        "base": h["rope_base"], "eps": h["norm_eps"],
    }  # fmt: skip
    generator = Causal(
        Transformer(h["spatial_layers"], **net, final=False), Label(width),
        Factorised(Transformer(h["factorized_layers"], **net), summed=True), Previous(shared=True),
    )  # fmt: skip
    spec = TokenSpec(grid(h["grid"], h["grid"]), codes=tuple(2**bits for bits in h["factor_bits"]))
    generator = generator.complete(spec, Info(classes=h["class_num"]))
    weights = {"transformer." + key: value for key, value in folder.weights.items()}
    return generator, loaded(generator, weights, source)[0]


def ar(folder):
    h, io = folder.h, folder.io
    generator, params = build(folder)
    tokens = jnp.stack([io["tokens_pre"], io["tokens_post"]], axis=-1)
    order, labels = raster(generator.spec), {"label": jnp.asarray(io["labels"])}

    @jax.jit
    def forced(params):
        def run(self):
            cond = self.condition(labels, jnp.zeros(len(tokens), bool))
            logits = self.head(self.hidden(tokens, cond, order), tokens)
            loss, weight, _ = self.loss(tokens, labels, order, drop=jnp.zeros(len(tokens), bool))
            return (loss * weight).sum() / weight.sum(), logits

        return jax.value_and_grad(lambda params: generator.apply({"params": params}, method=run), has_aux=True)(params)

    (loss, (pre, post)), grads = forced(params)
    first, *others = h["guidance_scale"]
    warm, *cool = h["temperature"]
    guidance, temperature = BySubCode(first, tuple(others)), Temperatures(warm, tuple(cool))
    knobs = Sampling(guidance, Temperatures(0.0, (0.0,) * len(cool))).knobs(order, generator.spec)
    batch = {"label": jnp.asarray(io["gen_labels"])}
    drawn = draws(generator, params, batch, raster, knobs, guided=True)
    raw = along_pairs(generator, params, batch, drawn)
    weights, degrees = (rule(order, generator.spec)[0] for rule in (guidance, temperature))
    guided = [(u + w * (c - u)) / t for (c, u), w, t in zip((np.split(x, 2) for x in raw), weights, degrees)]
    return {
        "logits_pre": pre,
        "logits_post": post,
        "loss": loss,
        "gen_pre": drawn[..., 0],
        "gen_post": drawn[..., 1],
        "gen_logits_pre": guided[0],
        "gen_logits_post": guided[1],
    } | gradients(folder, generator, grads, word="transformer.", loss="loss")


def along_pairs(generator, params, batch, tokens):
    """Logits of both sub-codes of cached steps along given tokens."""
    both = jnp.repeat(jnp.asarray(tokens), 2, axis=0)

    def readout(self, h):
        return h

    hidden = along(generator, params, batch, raster, tokens, readout)
    given = np.concatenate([both[0::2], both[1::2]])
    run = jax.jit(lambda params, h: generator.apply({"params": params}, method=lambda self: self.head(h, given)))
    return [np.asarray(x) for x in run(params, jnp.asarray(hidden))]


CASES = {"openmagvit2_vq": vq, "openmagvit2_ar": ar}
