"""The same images as files in folders, as tars, as a Hugging Face `Dataset` and as Parquet, in the same order."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def png(image: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    return content.getvalue()


def pack(
    place: Path, name: str, images: Sequence[np.ndarray], labels: Sequence[int], names: Sequence[str], shards: int
) -> Path:
    """Writes images, sorted by label, as what `data.name` is; returns the folder."""
    folder, count = place / name, len(images)
    folder.mkdir(parents=True)
    files, bounds = [png(image) for image in images], [count * i // shards for i in range(shards + 1)]
    if name == "image_folder":
        for i, (file, label) in enumerate(zip(files, labels)):
            (folder / names[label]).mkdir(exist_ok=True)
            (folder / names[label] / f"{i:06d}.png").write_bytes(file)
    elif name == "webdataset":
        for shard in range(shards):
            with tarfile.open(folder / f"part-{shard:03d}.tar", "w") as tar:
                for i in range(bounds[shard], bounds[shard + 1]):
                    add(tar, f"{i:06d}.cls", str(labels[i]).encode())
                    add(tar, f"{i:06d}.png", files[i])
        (folder / "classnames.txt").write_text("\n".join(names))
    else:
        import datasets

        features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
        rows = {"image": [{"bytes": file, "path": None} for file in files], "label": list(labels)}
        rows = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        if name == "huggingface":
            rows.save_to_disk(folder, num_shards=shards)
        else:
            for shard in range(shards):
                part = rows.select(range(bounds[shard], bounds[shard + 1]))
                part.to_parquet(folder / f"part-{shard:03d}.parquet", batch_size=16)
    return folder
