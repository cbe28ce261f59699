"""KL-16, the autoencoder of MAR, FlowAR and xAR."""

import jax
from parity.common import fixed, loaded, nchw, nhwc

from ar_jax.convert import mar
from ar_jax.tokenizers.continuous import draw, kl_divergence
from ar_jax.tokenizers.kl_vae import KLVAE


def kl16_vae(folder):
    h = folder.h

    def levels(side):  # those whose nominal size is listed
        listed = h[f"{side}_attn_resolutions"]
        return tuple(level for level in range(len(h["ch_mult"])) if h["resolution"] // 2**level in listed)

    vae = KLVAE(
        size=folder.shape("image")[2:], features=h["ch"], mult=tuple(h["ch_mult"]), res_blocks=h["num_res_blocks"],
        latent=h["embed_dim"], groups=h["norm_groups"], scale=(h["latent_scale"],), channels=h["in_channels"],
        encoder_attention=levels("encoder"), decoder_attention=levels("decoder"),
    )  # fmt: skip
    fixed(h, norm_eps=1e-6, double_z=True, out_ch=vae.channels, image_size=vae.size[0])
    params, _ = loaded(vae, folder.weights, mar)

    @jax.jit
    def run(params, image, noise, rect):
        call = lambda *args, method: vae.apply({"params": params}, *args, method=method)  # noqa: E731
        encoder_out = call(image, method=lambda self, x: self.encoder(x))
        mean, logvar = call(image, method="posterior")
        sample = draw(mean, logvar, noise)
        scaled = call(sample, method="standardise")
        outputs = {
            "encoder_out": encoder_out,
            "moments": call(encoder_out, method=lambda self, x: self.quant(x)),
            "mean": mean,
            "logvar": logvar,
            "sample": sample,
            "scaled_latent": scaled,
            "recon": call(scaled.reshape(len(scaled), vae.spec.n, -1), method="decode"),
            "recon_rect": call(rect, method="pixels"),
        }
        return {name: nchw(x) for name, x in outputs.items()} | {"kl": kl_divergence(mean, logvar)}

    return run(params, *(nhwc(folder.io[name]) for name in ("image", "noise", "latent_rect")))


CASES = {"kl16_vae": kl16_vae}
