"""In-painting of held-out images: what happens to kept pixels, and a picture.

    python tests/inpainting.py RUN [--count 200] [--out inpainting.png]

Of every held-out image the lower half of the middle is masked and drawn anew, with the image's class. Prints the error of
the kept pixels beside that of the tokenizer alone, both before the image's own pixels are pasted. The picture shows one
image per column: the image, its mask, the tokenizer's reconstruction, and three ways to fill the hole. Not a pytest file:
it needs a trained run.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from scipy.ndimage import maximum_filter

from ar_jax.data import Data, batches, open_source
from ar_jax.decode.edit import Edit, free_slots
from ar_jax.decode.sampling import read_sampling
from ar_jax.files.images import save_picture, tile, to_float, to_uint8
from ar_jax.files.models import open_model
from ar_jax.orders import known_first


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--data", default="mnist5k")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--out", default="inpainting.png")
    arguments = parser.parse_args()
    model, coder = (open_model(arguments.run, kind) for kind in ("generator", "tokenizer"))
    sampling = read_sampling(model.settings.get("sampling", {}), model.module)
    generator, tokenizer, order_fn = sampling.adapted(
        model.module, coder.module, model.order
    )
    params, frozen = model.params(), coder.params()
    data = Data(name=arguments.data, split="test", size=32)
    given = next(iter(batches(open_source(data), data, batch=arguments.count, seed=0, train=False)))
    image, batch = given["image"], {"label": jnp.asarray(given["label"])}
    free = np.zeros(image.shape[:3], bool)
    height, width = image.shape[1:3]
    free[:, height // 2 :, width // 4 : width - width // 4] = True
    known = np.asarray(~free_slots(tokenizer.spec, free[:1]))[0]

    @jax.jit
    def run(params, frozen, batch, seed):
        keys = jax.random.split(jax.random.key(seed), len(image))
        if generator.any_order:
            order, ranks = known_first(order_fn, tokenizer.spec, known, keys), int(known.sum())
        else:
            order, ranks = order_fn(tokenizer.spec, keys, len(image), 0), 0
        edit = Edit(to_float(image), jnp.asarray(free), 0, ranks)
        images, _ = sampling.images(generator, tokenizer, params, frozen, batch, order, keys=keys, edit=edit)
        return to_uint8(images)

    @jax.jit
    def reconstruct(frozen):
        tokens = tokenizer.apply({"params": frozen}, to_float(image), method="encode")
        return to_uint8(tokenizer.apply({"params": frozen}, tokens, method="decode"))

    filled, recon = [np.asarray(run(params, frozen, batch, seed)) for seed in range(3)], np.asarray(reconstruct(frozen))

    def error(x, where):
        return np.abs(x.astype(int) - image)[where].mean()

    pasted = [np.where(free[..., None], x, image) for x in filled]
    print(f"{len(image)} held-out images, {free[0].mean():.0%} of the pixels drawn anew; mean errors in grey levels:")
    for pixels in (0, 4, 8):
        kept = ~maximum_filter(free, (1, 2 * pixels + 1, 2 * pixels + 1))
        print(
            f"pixels kept, more than {pixels} from the hole: {error(filled[0], kept):.2f}; the tokenizer alone: "
            f"{error(recon, kept):.2f}; after pasting: {error(pasted[0], kept):.2f}"
        )
    shown, some = [image, np.where(free[..., None], 128, image), recon, *pasted], len(image) // 16
    save_picture(arguments.out, tile(np.concatenate([x[::some][:16] for x in shown]), 16))


if __name__ == "__main__":
    main()
