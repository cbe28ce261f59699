"""Files of what was drawn: PNG with all settings inside."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ar_jax.files.images import save_picture, tile


def save(
    folder: Path, number: int, images: np.ndarray, facts: Mapping[str, object], names: tuple[str, ...]
) -> list[Path]:
    """Writes uint8 [n h w 3] images, one by one and as a grid, under a number.

    Args:
      facts: what they were drawn with; goes into every file as JSON, the text "ar_jax".
      names: of their conditions.
    Returns:
      The paths: the grid, then the images.
    """
    grid = folder / f"{number:06d}.png"
    paths = [grid, *(folder / f"{number:06d}_{i:02d}.png" for i in range(len(images)))]
    for i, path in enumerate(paths):
        one = dict(facts) if path == grid else {**facts, "image": i - 1, "condition": names[i - 1]}
        save_picture(path, tile(images) if path == grid else images[i - 1], {"ar_jax": json.dumps(one)})
    return paths
