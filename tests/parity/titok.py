"""Tokenizers and discriminator of TiTok and TA-TiTok."""

import jax
import jax.numpy as jnp
import numpy as np
from parity.common import fixed, loaded, nchw, nhwc

from ar_jax.convert import titok as source
from ar_jax.convert.names import CONV, PLAIN, to_params
from ar_jax.nets import patchgan
from ar_jax.nets.blur_gan import BLUR, BlurGan
from ar_jax.nets.vit import ClipViT
from ar_jax.tokenizers.continuous import draw, kl_divergence
from ar_jax.tokenizers.maskgit_vqgan import MaskgitVQGAN
from ar_jax.tokenizers.quantize import VectorLoss
from ar_jax.tokenizers.quantize_anchored import anchored
from ar_jax.tokenizers.titok import TiTok, TiTokVAE
from ar_jax.tokens import sides


def line(x):
    """Rows [b n c] as [b c 1 n]."""
    return jnp.swapaxes(x, 1, 2)[:, :, None]


def rows(x):
    return jnp.swapaxes(jnp.asarray(x)[:, :, 0], 1, 2)


def build(folder):
    h = folder.h

    def tower(name):
        width = h[f"{name}_width"]
        return ClipViT(
            h[f"{name}_layers"], width, h[f"{name}_heads"], hidden=int(h["mlp_ratio"] * width), eps=h["norm_eps"]
        )

    size, legacy = sides(h["image_size"]), h["is_legacy"]
    fields = {
        "size": size, "cell": sides(h["enc_patch_size"]), "drawn_cell": sides(h["dec_patch_size"]), "slots": h["num_latent_tokens"],
        "encoder": tower("enc"), "decoder": tower("dec"), "channels": folder.shape("image")[1],
    }  # fmt: skip
    if "text_context_length" in h:
        fields |= {"text_rows": h["text_context_length"], "text_width": h["text_embed_dim"]}
    fixed(h, finetune_decoder=legacy)
    if h["quantize_mode"] == "vae":
        fixed(h, is_legacy=False)
        return TiTokVAE(**fields, latent=h["token_size"], kl=1.0)
    proxy = None
    if legacy:
        proxy = MaskgitVQGAN(
            size, h["pixel_hidden_channels"], tuple(h["pixel_channel_mult"]), res_blocks=h["pixel_num_res_blocks"],
            codes=h["pixel_codebook_size"], code_features=h["pixel_z_channels"], groups=h["pixel_norm_num_groups"],
        )  # fmt: skip
    return TiTok(
        **fields, codes=h["codebook_size"], code_features=h["token_size"], l2_norm=h["use_l2_norm"],
        vq=VectorLoss(commit=h["commitment_cost"]), proxy=proxy, mixed=legacy,
    )  # fmt: skip


def captions(folder):
    """Features of captions, all of whose rows are seen, as keyword arguments of what looks at them; {} if there are none."""
    if "text" not in folder.io:
        return {}
    text = jnp.asarray(folder.io["text"])
    return {"batch": {"text": text, "text_mask": jnp.ones(text.shape[:2], bool)}}


def shown(images):
    return nchw((images + 1) / 2)


def vq(folder):
    io, module, said = folder.io, build(folder), captions(folder)
    params, _ = loaded(module, folder.weights, source)

    @jax.jit
    def run(params, image, tokens, z, readout):
        def call(*args, method, **keywords):
            return module.apply({"params": params}, *args, method=method, **keywords)

        def objective(params, z):
            quant, index, losses = module.apply({"params": params}, z, method="quantise")
            return sum(losses.values()) + (quant * readout).sum(), (losses, index)

        (grad_params, grad_z), (losses, index) = jax.grad(objective, argnums=(0, 1), has_aux=True)(params, z)
        latents = call(image, method="latents")
        quant, indices, _ = call(latents, method="quantise")
        outputs = {
            "encoder_latent": line(latents), "quant": line(quant), "indices": indices,
            "decoded": shown(call(quant, method="pixels", **said)), "decoded_tokens": shown(call(tokens, method="decode", **said)),
            "loss_total": sum(losses.values()), "loss_commitment": losses["commit"], "loss_codebook": losses["codebook"],
            "loss_indices": index, "loss_grad_latent": line(grad_z), "loss_grad_codebook": grad_params["codebook"],
        }  # fmt: skip
        if module.proxy:
            outputs["decoder_logits"] = nchw(call(quant, method="logits"))
        return outputs

    tokens, z = jnp.asarray(io["tokens"])[..., None], rows(io["loss_latent"])
    outputs = run(params, 2 * nhwc(io["image"]) - 1, tokens, z, rows(io["loss_readout"]))
    if "cluster_prob" in io:
        used, codes = jnp.asarray(io["cluster_prob"]), params["codebook"]
        latents, index = z.reshape(-1, z.shape[-1]), outputs["loss_indices"].reshape(-1)
        outputs["cluster_prob_after"], outputs["cluster_codebook_after"] = anchored(used, codes, latents, index)
    return outputs


def vae(folder):
    io, module, said = folder.io, build(folder), captions(folder)
    params, _ = loaded(module, folder.weights, source)

    @jax.jit
    def run(params, image, noise):
        def call(*args, method, **keywords):
            return module.apply({"params": params}, *args, method=method, **keywords)

        told = module.apply({"params": params}, image, method=lambda self, image: self.to_code(self.told(image)))
        moments = call(image, method="moments")
        mean, logvar = jnp.split(moments, 2, axis=-1)
        sample = draw(mean, logvar, noise)
        _, losses, seen = call(image, method="autoencode")
        kl = jax.vmap(kl_divergence, 1, 1)(mean, logvar)
        return {
            "encoder_latent": line(told),
            "post_mean": line(seen["latents"]),
            "post_logvar": line(logvar),
            "post_std": line(jnp.exp(logvar / 2)),
            "post_kl": kl + losses["kl"] - kl.sum(1).mean(),  # what is trained for is their sum
            "post_sample": line(sample),
            "decoded_sample": shown(call(sample, method="decode", **said)),
            "decoded_mode": shown(call(call(image, method="encode"), method="decode", **said)),
        }

    return run(params, 2 * nhwc(io["image"]) - 1, rows(io["noise"]))


def discriminator_rules(net):
    places = [("first", "block_in.0"), ("hidden", "to_logits.0"), ("logits", "to_logits.2")]
    places += [(f"conv{i}", f"blocks.{i}.0") for i in range(net.stages)]
    return [
        *((f"{ours}/kernel", f"{theirs}.weight", CONV) for ours, theirs in places),
        *((f"{ours}/bias", f"{theirs}.bias", PLAIN) for ours, theirs in places),
        (r"norm(\d+)/scale", r"blocks.\1.2.weight", PLAIN),
        (r"norm(\d+)/bias", r"blocks.\1.2.bias", PLAIN),
    ]


def discriminator(folder):
    h, io = folder.h, folder.io
    net = BlurGan(
        h["hidden_channels"], h["num_stages"], h["pool_size"], h["norm_num_groups"], leaky_slope=h["leaky_slope"]
    )
    fixed(h, in_channels=3, norm_eps=1e-5, blur_kernel=list(BLUR))
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), {}, True))["params"]
    weights = {key: np.asarray(folder.weights[key]) for key in folder.weights}
    blurs = [key for key in weights if key.endswith(".1.kernel")]
    for key in blurs:
        np.testing.assert_allclose(weights[key][0, 0], np.outer(BLUR, BLUR) / sum(BLUR) ** 2, rtol=1e-6)
    params = to_params(weights, shapes, discriminator_rules(net), blurs)

    @jax.jit
    def run(params, real, fake, averages):
        def judge(image):
            return net.apply({"params": params}, 2 * image - 1, net.init_stats(), True)[0]

        logits_real, logits_fake = judge(real), judge(fake)
        return {
            "logits_real": nchw(logits_real),
            "logits_fake": nchw(logits_fake),
            "hinge_d": patchgan.hinge_discriminator(logits_real, logits_fake),
            "lecam": patchgan.lecam_of_means(logits_real, logits_fake, averages)[0],
            "grad_fake": nchw(jax.grad(lambda image: patchgan.hinge_generator(judge(image)))(fake)),
        }

    averages = jnp.concatenate([io["ema_real"], io["ema_fake"]])
    return run(params, nhwc(io["real"]), nhwc(io["fake"]), averages)


CASES = {"titok_vq": vq, "titok_vq_nonlegacy": vq, "titok_vae": vae, "titok_discriminator": discriminator}
CASES |= {"tatitok_vq": vq, "tatitok_vae": vae}
