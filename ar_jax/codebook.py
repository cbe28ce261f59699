"""Makes what k-means finds for a tokenizer: the frozen codebook of VQGAN-LC and DiGIT, of features that a teacher sees in your
images, or the clusters of a trained codebook (CTF).

    python -m ar_jax.codebook CONFIG --out OUT [--name value ...]

    python -m ar_jax.codebook configs/vqgan_lc.py:mnist5k --out checkpoints/codebook_mnist5k
    python -m ar_jax.codebook configs/vqgan_lc.py:f16 --teacher.path teachers/clip_l14.export --out checkpoints/codebook_clip
    python train.py configs/vqgan_lc.py:mnist5k --tokenizer.start checkpoints/codebook_mnist5k

Every image gives --pool x --pool vectors: the teacher's map, averaged. Images of each class are clustered on their own into an equal share of
the codes, or all together if there are no classes (or with --together True). OUT is a tokenizer that has not been trained, but
begins with these features. All vectors are held in memory, two bytes a number: 31 GB for ImageNet and CLIP. One process, one
device. Needs scikit-learn (extra `codebook`).

DiGIT's tokenizer (`FeatureCodes`) is clustered on its own grid, with its own teacher unless another is given, all classes together.

Clusters (`Clustered`) are those of the codes of a trained tokenizer, which OUT holds with them; images are not asked:

    python -m ar_jax.codebook configs/ctf.py:mnist5k --base runs/mnist5k_llamagen --out checkpoints/clusters_mnist5k

Source: VQGAN-LC (arXiv:2406.11837), DiGIT (arXiv:2410.12490), CTF (arXiv:2503.16194).
"""

import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from ar_jax.config import load_config
from ar_jax.data import Data, Info, batches, open_source
from ar_jax.files import codec
from ar_jax.files.images import to_float
from ar_jax.files.models import describe, open_model
from ar_jax.files.places import path_of, reachable, remove_tree
from ar_jax.files.trust import taken
from ar_jax.machine import distributed
from ar_jax.machine.seeds import Seed, key_of
from ar_jax.nets.resize import resize
from ar_jax.tokenizers.clustered import Clustered
from ar_jax.tokenizers.feature_codes import FeatureCodes
from ar_jax.tokenizers.vqgan_lc import VQGANLC
from ar_jax.train.checkpoint import save_params
from ar_jax.train.exported import Exported
from ar_jax.train.teachers import EfficientNet
from ar_jax.typing import Array, Params, Within

MANY = 200_000  # vectors from which on k-means looks at some of them at a time


@dataclasses.dataclass(frozen=True)
class Options:
    """What the features are, and where they go."""

    out: str
    """Folder to write, new or empty."""
    data: Data = Data()
    teacher: Exported = Exported()
    """A network in a file that jax.export wrote; without a path EfficientNet-Lite0 (extra `evaluate`)."""
    pool: Annotated[int, Within(1, 64)] = 4
    """Vectors of an image, a side; of FeatureCodes it has as many as codes."""
    together: bool = False
    """Cluster images of all classes together, as of FeatureCodes always; the published codebook of VQGAN-LC has an equal share
    for each class."""
    batch: int = 64
    """Images that the teacher sees at a time."""
    seed: Seed = 0
    base: str = ""
    """Of Clustered: folder of the trained tokenizer, or of its run."""


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    prog = "python -m ar_jax.codebook"
    arguments = arguments or ["--help"]
    with distributed.command(prog):
        config, *rest = reachable(taken(arguments))
        if {config, *rest} & {"--help", "-h"} and config.startswith("-"):
            tyro.cli(Options, args=["--help"], prog=f"{prog} CONFIG", description=__doc__)
        if config.startswith("-"):
            raise ValueError(f"CONFIG comes first, such as configs/vqgan_lc.py:mnist5k, but {config} stands there")
        experiment = load_config(config)
        default = Options(tyro.MISSING, dataclasses.replace(experiment.data, crop="centre", flip=False))
        options = tyro.cli(Options, default=default, args=rest, prog=f"{prog} {config}", description=__doc__)
        codec.check(options)
        write(experiment.tokenizer.module, options)


def write(tokenizer: VQGANLC | FeatureCodes | Clustered, options: Options) -> None:
    """Writes the model folder, complete or not at all.

    Raises:
      ValueError: another tokenizer, a teacher or a base that is missing or does not fit, a folder that is not empty, codes that
        cannot be divided among the classes, or too few images for them.
    """
    if not isinstance(tokenizer, (VQGANLC, FeatureCodes, Clustered)):
        raise ValueError(
            f"the config's tokenizer is {type(tokenizer).__name__}; only VQGANLC, FeatureCodes and Clustered have what k-means finds"
        )
    folder = path_of(options.out)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--out is {options.out}, which is not empty; give another folder or remove it")
    try:
        import sklearn.cluster  # noqa: F401
    except ImportError as error:
        raise ValueError("k-means needs scikit-learn: pip install 'ar_jax[codebook]'") from error
    make = clusters if isinstance(tokenizer, Clustered) else frozen_codes
    if options.base and make is frozen_codes:
        raise ValueError(f"--base is {options.base}, but {type(tokenizer).__name__} is made of no other tokenizer; leave it out")
    temporary = folder
    if isinstance(folder, Path):
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        temporary.mkdir(parents=True)
    try:
        tokenizer, params, info, found = make(tokenizer, options)
        save_params(temporary / "params", params)
        describe(temporary, "tokenizer", tokenizer, info, {})
        if temporary != folder:
            if folder.exists():
                folder.rmdir()
            os.rename(temporary, folder)
    except BaseException:
        remove_tree(temporary, ignore_errors=True)
        raise
    print(f"{options.out} is complete: {found}")


def frozen_codes(
    tokenizer: VQGANLC | FeatureCodes, options: Options
) -> tuple[VQGANLC | FeatureCodes, Params, Info, str]:
    """The tokenizer, parameters with the codebook, what is known of the images, and a word on it."""
    places = (options.pool,) * 2
    if isinstance(tokenizer, FeatureCodes):
        teacher = options.teacher if options.teacher.path else tokenizer.teacher
        tokenizer, places = tokenizer.clone(teacher=teacher), tokenizer.grid
        options = dataclasses.replace(options, teacher=teacher, together=True)
    source, network = open_source(options.data), options.teacher
    if isinstance(network, Exported) and not network.path:
        network = EfficientNet()
    classes = 1 if options.together else max(source.info.classes, 1)
    if tokenizer.codes % classes:
        raise ValueError(
            f"tokenizer.codes is {tokenizer.codes}, which {classes} classes cannot share evenly; give a multiple of "
            f"{classes}, or --together True"
        )
    if isinstance(network, Exported) and not path_of(network.path).is_file():
        raise ValueError(f"--teacher.path is {network.path!r}, which is no file; give what jax.export wrote")
    params = network.open()
    width = jax.eval_shape(network, params, jnp.zeros((1, options.data.size, options.data.size, 3))).shape[-1]
    if width != tokenizer.feature_width:
        raise ValueError(
            f"tokenizer.feature_width is {tokenizer.feature_width}, but the teacher's features are {width} wide; give "
            f"the config this width, or another teacher"
        )
    found, label = features(network, params, source, options, places)
    codes = clustered(found, label % classes, classes, tokenizer.codes // classes, options.seed)
    begun = jax.jit(tokenizer.init_params)(key_of(options.seed))
    return tokenizer, {**begun, "frozen": codes}, source.info, f"{tokenizer.codes} codes of width {width}"


def clusters(tokenizer: Clustered, options: Options) -> tuple[Clustered, Params, Info, str]:
    """As `frozen_codes`: the best of ten tries at clusters of the codes of the base, as its decoder is given them."""
    from sklearn.cluster import KMeans

    if not options.base:
        raise ValueError("--base is missing: the folder of the trained tokenizer whose codes are clustered, or of its run")
    model = open_model(options.base, "tokenizer")
    tokenizer = tokenizer.clone(base=model.module)
    params, codes = model.params(), tokenizer.spec.codes[0]
    every = jnp.arange(codes, dtype=jnp.int32)[None, :, None]
    vectors = np.asarray(tokenizer.base.apply({"params": params}, every, method="embed")[0], np.float32)
    if len(np.unique(vectors, axis=0)) < tokenizer.clusters:
        raise ValueError(f"tokenizer.clusters is {tokenizer.clusters}, but fewer of the {codes} codes differ; give fewer")
    cluster = KMeans(tokenizer.clusters, n_init=10, random_state=options.seed % 2**32).fit(vectors).labels_
    sizes = np.bincount(cluster, minlength=tokenizer.clusters)
    found = f"{codes} codes in {tokenizer.clusters} clusters of {sizes.min()} to {sizes.max()}"
    return tokenizer, {**params, "cluster": cluster.astype(np.int32)}, model.info, found


def features(
    network: Any, params: Params, source: Any, options: Options, places: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of all images, float16 [images places c], and their labels, int [images], 0 where there are none."""

    @jax.jit
    def see(params: Params, image: Array) -> Array:
        seen = resize(network(params, to_float(image)).astype(jnp.float32), places, "area")
        return seen.reshape(len(seen), -1, seen.shape[-1]).astype(jnp.float16)

    found, labels = [], []
    with tqdm(total=len(source), desc="looking", unit="image", disable=None) as progress:
        for batch in batches(source, options.data, batch=options.batch, seed=0, train=False):
            count = len(batch["image"])
            image = np.resize(
                batch["image"], (options.batch, *batch["image"].shape[1:])
            )  # one program for the last too
            found.append(np.asarray(see(params, image))[:count])
            labels.append(batch.get("label", np.zeros(count, np.int32)))
            progress.update(count)
    found = np.concatenate(found)
    if not np.isfinite(found).all():
        raise ValueError(
            "the teacher makes of some images numbers that are not finite as float16; are its weights damaged?"
        )
    return found, np.concatenate(labels)


def clustered(found: np.ndarray, group: np.ndarray, groups: int, codes: int, seed: int) -> np.ndarray:
    """Centres [groups*codes c] of k-means over the vectors of every group, float32.

    Args:
      found: [images n c].
      group: of each image, 0..groups.
      codes: centres of a group.
    Raises:
      ValueError: a group with fewer vectors than centres.
    """
    return np.concatenate(list(_centres(found, group, groups, codes, seed)))


def _centres(found, group, groups, codes, seed) -> Iterator[np.ndarray]:
    from sklearn.cluster import KMeans, MiniBatchKMeans

    for i in tqdm(range(groups), desc="clustering", unit="class", disable=None):
        vectors = found[group == i].reshape(-1, found.shape[-1]).astype(np.float32)
        if len(vectors) < codes:
            raise ValueError(
                f"class {i} has {len(vectors)} vectors for {codes} codes; take fewer codes, more images or a larger --pool"
            )
        kind = KMeans if len(vectors) <= MANY else MiniBatchKMeans
        yield kind(codes, n_init=1, random_state=seed % 2**32).fit(vectors).cluster_centers_


if __name__ == "__main__":
    main()
