"""Tokenizers: images to tokens and back, one file for each, and their quantisers.

A tokenizer is a module. Of all are asked `size`, `channels`, `spec`, `rules`, `init_params`, and the methods `encode`,
`embed` and `decode`, as `vqgan.py` has them. To be trained (`train/tokenizer.py`) or cached it also has

- `autoencode(image, key=...)` -> the reconstruction, or None if its decoder is generative and makes no image in training;
  the losses that it reports itself, weighted, by name; and what it shows by name: "tokens" as of `encode`, if they are
  codes; "latents", what the codes stand for in the order of the tokens (to replace dead codes; a tuple with one for each
  codebook if there are several); any features that a teacher may look at.
  "target" are the images that the reconstruction is compared with, where these are not the ones given.
- `codebooks`, where tokens are codes: which are learned, and where they lie (`quantize.Codebook`). Without it none is. Of one
  that follows averages (`quantize_averaged.Average`), `autoencode` shows in "members", by path, the vectors [m c] and the
  codes that they chose [m]; its parameter gets no gradient.
- `last_layer`, the path of the parameter where the adaptive weight of a discriminator measures gradients. Needed for that
  only.
- `draws = True`, if it draws tokens from a Gaussian: then `encode(image, key=...)` is `drawn(moments(image), key=...)`, and a
  cache keeps the moments.
- `stepped = True`, if training changes with time: then it is `autoencode(image, key=..., step=...)`, of the update's number.
- `generative = True`, if `decode` draws by its key; pictures in training then are `decode(encode(image), key=...)`. The key is one
  for all images, or an array with one for each; what an image draws depends on nothing but its own.
- `prefix(tokens, count, key=...)`, if any number of the first tokens decodes, and `prefixes`, at which numbers more can be seen
  (`ordered.py`); `partly(tokens, known, key=...)`, if whichever tokens are known can be shown (`clustered.py`).
- `corrected(image, key=...)`, if generators may learn to make up for mistakes (`GeneratorStage.mistaken`): tokens with a mistake in
  each image, and those that are to be predicted from them.
- `conditioned = ("text", "text_mask")`, or others: what it decodes with of a batch. Then `decode` and `autoencode` take `batch=`
  (`conditioned.said_of`), and without it decode as if nothing were said.
- `host_encode` and `host_decode`, numpy functions, if it is no network but a codec of the host (`host.OnHost`).
- `known(tokens, free)`, if its tokens have no fixed place in the image: those that editing keeps, where pixels are free.
"""
