"""Windows of photographs as a folder of images to train on, one class a photograph.

    python tests/windows.py DIR PHOTO... [--train 500] [--test 50] [--pixels 32] [--seed 0]

A window is a square whose side is 0.25 to 0.4 of the photograph's short side, at a random place, resized to PIXELS.
Those of DIR/test lie in the last 0.4 of the long side and those of DIR/train before it, so that they share no pixel.
DIR.png shows the first of each class, one class a column. Not a pytest file: it needs photographs.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from ar_jax.data.images import read_image
from ar_jax.files.images import save_picture, tile

SIDES = 0.25, 0.4  # of the short side
HELD_OUT = 0.4  # of the long side
SHOWN = 5


def windows(size: tuple[int, int], count: int, held_out: bool, rng: np.random.Generator) -> np.ndarray:
    """Left, top, right and bottom of random windows in a photograph of this width and height, int [count 4]."""
    sides = (min(size) * rng.uniform(*SIDES, count)).astype(int)
    cut = int(max(size) * (1 - HELD_OUT))
    low, high = np.zeros((count, 2), int), np.array(size) - sides[:, None]
    long = int(size[1] > size[0])
    if held_out:
        low[:, long] = cut
    else:
        high[:, long] = cut - sides
    place = rng.integers(low, high + 1)
    return np.concatenate([place, place + sides[:, None]], axis=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path)
    parser.add_argument("photos", nargs="+", type=Path)
    parser.add_argument("--train", type=int, default=500, help="windows of each photograph")
    parser.add_argument("--test", type=int, default=50)
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    columns = []
    for i, path in enumerate(sorted(arguments.photos, key=lambda path: path.stem)):
        photo, rng = read_image(path), np.random.default_rng([arguments.seed, i])
        for split in ("train", "test"):
            folder = arguments.dir / split / path.stem
            folder.mkdir(parents=True, exist_ok=True)
            boxes = windows(photo.size, getattr(arguments, split), split == "test", rng).tolist()
            for k, box in enumerate(boxes):
                small = photo.resize((arguments.pixels,) * 2, Image.Resampling.LANCZOS, box, reducing_gap=3.0)
                small.save(folder / f"{k:04d}.png")
                if split == "train" and k < SHOWN:
                    columns.append(np.asarray(small))
        print(f"{path.stem}: {photo.width}x{photo.height} pixels", flush=True)
    shown = np.stack(columns).reshape(len(arguments.photos), -1, *columns[0].shape)
    save_picture(f"{arguments.dir}.png", tile(np.concatenate(shown.swapaxes(0, 1)), len(arguments.photos)))


if __name__ == "__main__":
    main()
