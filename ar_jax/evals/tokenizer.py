"""What a tokenizer loses: images against their reconstructions, its codes, and what wrong codes do to the image."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ar_jax.evals import metrics
from ar_jax.evals.extract import Ahead, Extractor, in_chunks, pixels_hash, read_chunks
from ar_jax.evals.generation import gather
from ar_jax.evals.images import Images
from ar_jax.files.images import to_float, to_uint8
from ar_jax.files.models import Model
from ar_jax.machine.seeds import key_of
from ar_jax.machine.sharding import put, put_batch, replicated
from ar_jax.nets.lpips import Lpips, find_lpips
from ar_jax.tokenizers.host import on_host
from ar_jax.typing import Array, Int, PRNGKey, UInt8, typed

SHOWN = 32  # pairs for the report
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
HEIGHTS = (8, 12, 16, 24)  # of letters, in pixels
PERIODS = (2, 4, 8, 16, 32)  # of gratings, in pixels


@dataclasses.dataclass(frozen=True)
class Perturbation:
    """Each token becomes, with probability `alpha`, one of its `delta` nearest codes (itself among them), evenly; of
    several sub-codes each, by itself.

    Source: RobustTok's perturbation, for all images; arXiv:2503.08354.
    """

    alpha: float
    delta: int

    def __post_init__(self):
        if not 0 <= self.alpha <= 1 or self.delta < 1:
            raise ValueError(
                f"alpha is {self.alpha} and delta {self.delta}; alpha must lie in [0, 1], delta be at least 1"
            )


@typed
def perturb(
    key: PRNGKey, tokens: Int[Array, "n k"], near: tuple[Int[Array, "_ _"], ...], alpha: float
) -> Int[Array, "n k"]:
    """Applies a `Perturbation` to the tokens of one image, given the nearest codes of every code of each sub-code."""
    where, which = jax.random.split(key)
    chosen = jax.random.randint(which, tokens.shape, 0, jnp.array([table.shape[1] for table in near]))
    picked = jnp.stack([table[tokens[:, k], chosen[:, k]] for k, table in enumerate(near)], axis=-1)
    return jnp.where(jax.random.bernoulli(where, alpha, (len(tokens), 1)), picked, tokens)


def nearest_codes(table: np.ndarray, delta: int) -> np.ndarray:
    """int32 [codes delta], the nearest codes of each code by Euclidean distance, itself first.

    Raises:
      ValueError: delta is larger than the codebook.
    """
    if delta > len(table):
        raise ValueError(f"delta is {delta}, but the codebook has {len(table)} codes; give smaller --deltas")
    table, found = np.asarray(table, np.float64), []
    square = (table**2).sum(1)
    for first in range(0, len(table), 1024):
        block = table[first : first + 1024]
        distance = square - 2 * block @ table.T
        distance[np.arange(len(block)), first + np.arange(len(block))] = -np.inf  # also before its duplicates
        part = np.argpartition(distance, delta - 1, 1)[:, :delta]
        order = np.argsort(np.take_along_axis(distance, part, 1), 1, kind="stable")
        found.append(np.take_along_axis(part, order, 1))
    return np.concatenate(found).astype(np.int32)


class Judged:
    """A tokenizer on this process's devices.

    Attributes:
      remarks: what cannot be measured, and why.
    """

    def __init__(
        self, model: Model, extractor: Extractor, seed: int, perturbations: tuple[Perturbation, ...], lpips: str | None
    ):
        self.module, self.extractor, self.seed = model.module, extractor, seed
        self.spec, self.size = model.module.spec, tuple(model.module.size)
        mesh = extractor.mesh
        self.params = put(model.params(), replicated(mesh))
        self.remarks: list[str] = []
        tables = self._tables()
        self.perturbations, self._near = perturbations if tables else (), {}
        for delta in sorted({each.delta for each in self.perturbations}):
            few = min(map(len, tables))
            if delta > few:
                self.remarks.append(f"pFD: a sub-code of {few} codes has no {delta} nearest, all of them are taken")
            near = tuple(nearest_codes(table, min(delta, len(table))) for table in tables)
            self._near[delta] = put(near, replicated(mesh))
        if getattr(self.module, "conditioned", ()):
            self.remarks.append("decoded without captions")
        self._lpips = None
        try:
            if lpips is not None:
                self._lpips = put(find_lpips(lpips or None), replicated(mesh))
        except ValueError as error:
            self.remarks.append(f"no LPIPS: {error}")
        if min(self.size) < metrics.MS_SMALLEST:
            self.remarks.append(f"no MS-SSIM: it needs images of {metrics.MS_SMALLEST} pixels, these have {self.size}")

        @jax.jit
        def reconstruct(params, lpips, image, rows):
            tokens = self._each("encode", params, to_float(image), key_of(seed), rows)
            recon, finite = self._pixels(params, tokens, rows)
            a, b = (x.astype(jnp.float32) / 255 for x in (image, recon))
            found = {"psnr": metrics.psnr(a, b), "ssim": metrics.ssim(a, b)}
            if min(self.size) >= metrics.MS_SMALLEST:
                found["ms_ssim"] = metrics.ms_ssim(a, b)
            if lpips is not None:
                found["lpips"] = Lpips().apply(lpips, to_float(image), to_float(recon))
            return found | {"tokens": tokens, "recon": recon, "finite": finite}

        @functools.partial(jax.jit, static_argnums=4)
        def disturbed(params, tokens, near, rows, which):
            key = jax.random.fold_in(key_of(seed), which + 1)
            keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
            alpha = self.perturbations[which].alpha
            return self._pixels(params, jax.vmap(lambda k, t: perturb(k, t, near, alpha))(keys, tokens), rows)[0]

        self._reconstruct, self._disturbed = reconstruct, disturbed

    def _pixels(self, params, tokens, rows):
        image = self._each("decode", params, tokens, key_of((self.seed + 1) % 2**64), rows)
        return to_uint8(image), jnp.isfinite(image).all((1, 2, 3))

    def _each(self, method, params, x, key, rows):
        """Every image by itself, with the key of its number: what is drawn does not depend on the batch."""
        apply = functools.partial(self.module.apply, {"params": params}, method=method)
        return jax.vmap(lambda x, row: apply(x[None], key=jax.random.fold_in(key, row))[0])(x, rows)

    def _tables(self) -> list[np.ndarray]:
        """Vectors [codes c] of each sub-code: those of tokens that differ in nothing else."""
        if not self.spec.codes:
            self.remarks.append("no pFD: its tokens are continuous")
            return []
        if on_host(self.module):
            self.remarks.append("no pFD: its codes stand for no vectors")
            return []
        if any(book.levels for book in getattr(self.module, "codebooks", ())):
            self.remarks.append("no pFD: a code stands for different vectors on different levels")
            return []
        tables = []
        for k, size in enumerate(self.spec.codes):
            tokens = jnp.zeros((1, size, len(self.spec.codes)), jnp.int32).at[0, :, k].set(jnp.arange(size))
            tables.append(np.asarray(self.module.apply({"params": self.params}, tokens, method="embed"))[0])
        return tables

    def compute(self, images: np.ndarray, rows: range) -> dict[str, np.ndarray]:
        """Arrays of a chunk; see `evaluate`."""
        found, batch = {}, self.extractor.batch
        for first in range(0, len(images), batch):
            part, some = images[first : first + batch], rows[first : first + batch]
            padded = put_batch(
                {"image": np.resize(part, (batch, *part.shape[1:])), "rows": np.resize(np.asarray(some), batch)},
                self.extractor.mesh,
            )
            out = self._reconstruct(self.params, self._lpips, padded["image"], padded["rows"])
            for i, each in enumerate(self.perturbations):
                out[f"disturbed_{i}"] = self._disturbed(
                    self.params, out["tokens"], self._near[each.delta], padded["rows"], i
                )
            for name, x in jax.device_get(out).items():
                found.setdefault(name, []).append(x[: len(part)])
        found = {name: np.concatenate(parts) for name, parts in found.items()}
        if not found.pop("finite").all():
            raise ValueError(f"reconstructions of images {rows.start} to {rows.stop - 1} hold NaN or infinity")
        for kind, pixels in (("real", images), ("recon", found.pop("recon"))):
            found |= {f"{kind}_{name}": x for name, x in self.extractor(pixels).items()}
            found[f"{kind}_shown"] = pixels[: SHOWN if rows.start == 0 else 0]
            found[f"{kind}_sha256"] = pixels_hash(pixels)
        for i in range(len(self.perturbations)):
            features = self.extractor(found.pop(f"disturbed_{i}"))
            found |= {f"disturbed_{i}_{name}": features[name] for name in ("pool", "spatial")}
            found[f"disturbed_{i}_sha256"] = np.zeros(0, np.uint8)
        return found

    def autoencode(self, images: UInt8[np.ndarray, "n h w 3"]) -> UInt8[np.ndarray, "n h w 3"]:
        """Reconstructions of any number of images."""
        batch, found = self.extractor.batch, []
        for first in range(0, len(images), batch):
            part = images[first : first + batch]
            padded = {"image": np.resize(part, (batch, *part.shape[1:])), "rows": np.arange(batch)}
            padded = put_batch(padded, self.extractor.mesh)
            recon = self._reconstruct(self.params, self._lpips, padded["image"], padded["rows"])["recon"]
            found.append(np.asarray(recon)[: len(part)])
        return np.concatenate(found)


def evaluate(judged: Judged, images: Images, count: int, folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """All figures of a tokenizer.

    Returns:
      "figures" by name; "codes", a table by level and sub-codebook; "perturbed", a table by perturbation; "shown",
      uint8 pairs of images; "sha256" of the images.
    """
    source = Ahead(images, count)
    files = in_chunks(folder, identity, count, lambda rows: judged.compute(source.read(rows), rows), "images")
    suffix = judged.extractor.network.suffix
    title = "FID" if not suffix else "FD"
    real, recon = (gather(read_chunks(files), f"{kind}_") for kind in ("real", "recon"))
    figures: dict[str, float | None] = {
        f"r{title}{suffix}": metrics.frechet(recon.moments, real.moments),
        f"rs{title}{suffix}": metrics.frechet(recon.spatial, real.spatial),
    }
    table = []
    for i, each in enumerate(judged.perturbations):
        moments = gather(read_chunks(files), f"disturbed_{i}_").moments
        table.append({**dataclasses.asdict(each), f"{title}{suffix}": metrics.frechet(moments, real.moments)})
    figures[f"p{title}{suffix}"] = float(np.mean([row[title + suffix] for row in table])) if table else None
    remarks = list(judged.remarks)
    for name, title in (("psnr", "PSNR"), ("ssim", "SSIM"), ("ms_ssim", "MS-SSIM"), ("lpips", "LPIPS-VGG")):
        values = [chunk[name] for chunk in read_chunks(files) if name in chunk]
        figures[title] = float(np.concatenate(values).mean(dtype=np.float64)) if values else None
        if figures[title] == float("inf"):
            figures[title] = None
            remarks.append("PSNR is infinite: reconstructions equal the images")
    codes = []
    if judged.spec.codes:
        codes = _code_table(judged.spec, files)
        for name in ("usage", "perplexity"):
            figures[f"code_{name}"] = float(np.mean([row[name] for row in codes if row["level"] == "all"]))
        figures["bits_per_pixel"] = metrics.bits_per_pixel(judged.spec.n, judged.spec.codes, judged.size)
    else:
        remarks.append("no usage, perplexity and bits per pixel: tokens are continuous")
    pairs = np.stack([real.shown[:SHOWN], recon.shown[:SHOWN]], 1).reshape(-1, *real.shown.shape[1:])
    return {
        "figures": figures, "codes": codes, "perturbed": table, "shown": pairs, "sha256": real.sha256, "remarks": remarks
    }  # fmt: skip


def _code_table(spec, files):
    """Usage and perplexity of every sub-codebook, over all slots and by level."""
    levels = np.unique(spec.coords[:, 0])
    counts = {(level, k): np.zeros(size, np.int64) for level in levels for k, size in enumerate(spec.codes)}
    for chunk in read_chunks(files):
        for (level, k), total in counts.items():
            total += np.bincount(chunk["tokens"][:, spec.coords[:, 0] == level, k].reshape(-1), minlength=len(total))
    table = []
    for k in range(len(spec.codes)):
        total = sum(counts[level, k] for level in levels)
        table.append({"level": "all", "sub_code": k, "seen": int(total.sum()), **metrics.code_use(total)})
        if len(levels) > 1:
            for level in levels:
                found = counts[level, k]
                row = {"level": int(level), "sub_code": k, "seen": int(found.sum()), **metrics.code_use(found)}
                table.append(row)
    return table


# What survives: fine patterns and letters ------------------------------------------------------------------


def detail(judged: Judged) -> dict[str, float]:
    """Share of the contrast of gratings that a reconstruction keeps, by period in pixels; 1 is perfect.

    Two directions, four phases each; mean 0.5, amplitude 0.4.
    """
    height, width = judged.size
    found = {}
    for period in PERIODS:
        if 2 * period > min(height, width):
            continue
        y, x = np.mgrid[:height, :width]
        waves = []
        for place in (y, x):
            for phase in range(4):
                turn = 2 * np.pi * (place + 0.5) / period + np.pi * phase / 4
                waves.append(np.cos(turn))
        waves = np.stack(waves)
        images = np.rint(255 * (0.5 + 0.4 * waves)).astype(np.uint8)[..., None].repeat(3, -1)
        kept = judged.autoencode(images).astype(np.float64).mean(-1)
        shown = images.astype(np.float64).mean(-1)
        contrast = [(x * waves).sum((1, 2)) for x in (kept, shown)]
        strong = np.abs(contrast[1]) > 0.1 * np.abs(contrast[1]).max()  # at period 2 some phases vanish
        found[f"contrast_{period}px"] = float((contrast[0][strong] / contrast[1][strong]).mean())
    return found


def text(judged: Judged, lines: int = 64) -> dict[str, float]:
    """Share of letters read wrongly from reconstructions of rendered text, by their height in pixels.

    The reader knows the font and the grid of letters and takes the nearest, so it makes no mistakes on the originals.
    """
    found = {}
    for height in HEIGHTS:
        glyphs = letters(height)
        rows, columns = (side // cell for side, cell in zip(judged.size, glyphs.shape[1:]))
        if rows * columns < 2:
            continue
        pages = -(-lines // (rows * columns))
        wanted = np.random.default_rng(height).integers(len(glyphs), size=(pages, rows, columns))
        images = np.full((pages, *judged.size, 3), 255, np.uint8)
        written = (
            glyphs[wanted].transpose(0, 1, 3, 2, 4).reshape(pages, rows * glyphs.shape[1], columns * glyphs.shape[2])
        )
        images[:, : written.shape[1], : written.shape[2]] = written[..., None]
        for name, pixels in (("original", images), ("wrong", judged.autoencode(images))):
            errors = [
                metrics.edit_distance(a, b)
                for a, b in zip(wanted.reshape(pages, -1), read(pixels, glyphs, wanted.shape))
            ]
            found[f"{name}_{height}px"] = sum(errors) / wanted.size
        if found.pop(f"original_{height}px"):
            raise ValueError(f"letters of {height} pixels cannot be told apart; is another default font in use?")
        found[f"letter_errors_{height}px"] = found.pop(f"wrong_{height}px")
    return found


@functools.lru_cache
def letters(height: int) -> np.ndarray:
    """All characters in black on white, uint8 [characters h w], in cells of one size."""
    font = ImageFont.load_default(size=height)
    boxes = [font.getbbox(c) for c in CHARACTERS]
    width, top = max(b[2] for b in boxes) + 1, min(b[1] for b in boxes)
    bottom = max(b[3] for b in boxes)
    cells = []
    for c in CHARACTERS:
        cell = Image.new("L", (width, bottom - top + 1), 255)
        ImageDraw.Draw(cell).text((0, -top), c, fill=0, font=font)
        cells.append(np.asarray(cell))
    return np.stack(cells)


def read(images: np.ndarray, glyphs: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Numbers of the characters in a grid of cells, int [pages rows*columns]: each cell's nearest glyph."""
    pages, rows, columns = shape
    _, h, w = glyphs.shape
    grey = images.astype(np.float64).mean(-1)[:, : rows * h, : columns * w]
    cells = grey.reshape(pages, rows, h, columns, w).transpose(0, 1, 3, 2, 4).reshape(pages, rows * columns, 1, h * w)
    return ((cells - glyphs.reshape(len(glyphs), -1)) ** 2).sum(-1).argmin(-1)
