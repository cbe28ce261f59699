"""Results: JSON that says exactly what was measured, their comparison, and a page to look at."""

import importlib.metadata
import json
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ar_jax.files import codec
from ar_jax.files.images import tile
from ar_jax.files.models import versions, write_json
from ar_jax.files.places import made, path_of

FORMAT = 1


def save(path: Path, kind: str, figures: dict[str, Any], protocol: dict[str, Any], **rest: Any) -> dict[str, Any]:
    """Writes a result.

    Args:
      path: of the JSON.
      kind: "generation" or "tokenizer".
      figures: what was measured; None for what could not be.
      protocol: all that has to be equal for two results to be compared.
      rest: everything else worth knowing: of the samples, remarks, tables, speed.
    Returns:
      The result.
    """
    more = {name: importlib.metadata.version(name) for name in ("scipy", "pillow")}
    result = {
        "format": FORMAT,
        "kind": kind,
        "figures": figures,
        "protocol": protocol,
        **rest,
        "versions": versions() | more,
    }
    result = json.loads(json.dumps(result))
    write_json(path, result)
    return result


def load(path: str) -> dict[str, Any]:
    """Reads a result.

    Raises:
      ValueError, FileNotFoundError: no such file, or none of ours.
    """
    try:
        result = json.loads(path_of(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error})") from error
    if not isinstance(result, dict) or result.get("format") != FORMAT or "protocol" not in result:
        raise ValueError(f"{path} is no result of ar_jax.evaluate (format {FORMAT})")
    return result


def compare(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, float | None, float | None]]:
    """Figures of two results side by side.

    Raises:
      ValueError: they were measured by different protocols; the first difference is named.
    """
    for part in ("kind", "protocol"):
        if difference := codec.difference(a[part], b[part], part):
            raise ValueError(f"these cannot be compared: {difference}")
    names = list(dict.fromkeys([*a["figures"], *b["figures"]]))
    return [(name, a["figures"].get(name), b["figures"].get(name)) for name in names]


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(figures: dict[str, Any]) -> str:
    rows = [
        (name, "-" if value is None else f"{value:.5g}")
        for name, value in figures.items()
        if not isinstance(value, dict)
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def side_by_side(rows: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of figures, a row for each name; what nobody has is left out, "-" is what one has not."""
    names = dict.fromkeys(name for row in rows.values() for name, value in row.items() if value is not None)
    names = sorted(names, key=lambda name: name != "bits_per_pixel")  # the rate, then what is lost
    lines = [["", *names]]
    for label, row in rows.items():
        lines.append([label, *("-" if row.get(name) is None else f"{row[name]:.4g}" for name in names)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * max(width, 3) for width in widths])
    return "".join(f"| {' | '.join(x.ljust(width) for x, width in zip(line, widths))} |\n" for line in lines)


def rates(path: Path, title: str, rows: dict[str, dict[str, Any]]) -> None:
    """A PNG of distortion and Frechet distance of reconstructions against bits a pixel; without a rate, dashed lines."""
    if jax.process_index() != 0:
        return
    plt = _pyplot()
    distance = next(name for row in rows.values() for name in row if name.startswith(("rFID", "rFD")))
    kinds = [
        name for name in ("PSNR", "LPIPS-VGG", distance) if any(row.get(name) is not None for row in rows.values())
    ]
    figure, axes = plt.subplots(1, len(kinds), figsize=(6 * len(kinds), 6), layout="constrained", squeeze=False)
    figure.suptitle(title)
    for axis, kind in zip(axes[0], kinds):
        axis.set_xscale("log", base=2)
        for i, (label, row) in enumerate(rows.items()):
            if row.get(kind) is None:
                continue
            colour = f"C{i % 10}"
            if row.get("bits_per_pixel"):
                axis.plot(row["bits_per_pixel"], row[kind], "o", color=colour)
                axis.annotate(
                    label, (row["bits_per_pixel"], row[kind]), fontsize=7, xytext=(3, 3), textcoords="offset points"
                )
            else:
                axis.axhline(row[kind], color=colour, linestyle="--", linewidth=1, label=f"{label} (continuous)")
        axis.set_xlabel("bits a pixel")
        axis.set_ylabel(kind)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    _save(figure, path)


def page(path: Path, title: str, result: dict[str, Any], images: np.ndarray, caption: str, columns: int = 8) -> None:
    """A PNG of one page: figures, protocol, per-class table if there is one, and a grid of images uint8 [n h w 3]."""
    if jax.process_index() != 0:
        return
    plt = _pyplot()
    figure, (text, grid) = plt.subplots(1, 2, figsize=(14, 9), width_ratios=(1, 1.2), layout="constrained")
    figure.suptitle(title)
    lines = [table(result["figures"]), ""]
    lines += [f"{name}: {_short(value)}" for name, value in result["protocol"].items()] + [""]
    lines += [f"{name}: {_short(value)}" for name, value in result.get("samples", {}).items()] + [""]
    for row in result.get("classes", [])[:20]:
        lines.append(f"{row['class']:<14.14} {row['agreement']:>6.1%} of {row['images']}")
    for row in result.get("perturbed", []):
        lines.append(", ".join(f"{name} {_short(value)}" for name, value in row.items()))
    for row in result.get("codes", [])[:30]:
        lines.append(", ".join(f"{name} {_short(value)}" for name, value in row.items()))
    lines += result.get("remarks", [])
    text.text(0, 1, "\n".join(_wrapped(lines)), va="top", family="monospace", fontsize=6.5, transform=text.transAxes)
    text.axis("off")
    grid.imshow(tile(images, columns), interpolation="nearest")
    grid.set_title(caption, fontsize=8)
    grid.axis("off")
    _save(figure, path)


def curves(path: Path, title: str, points: Sequence[dict[str, Any]], suffix: str) -> None:
    """A PNG of the distance over the score, recall over precision, and both against guidance.

    Args:
      points: with "settings" and "figures" each.
      suffix: of the figures' names.
    """
    if jax.process_index() != 0:
        return
    plt = _pyplot()
    distance = ("FID" if not suffix else "FD") + suffix
    pairs = (("IS" + suffix, distance), ("precision" + suffix, "recall" + suffix), ("guidance", distance))
    figure, axes = plt.subplots(1, 3, figsize=(15, 5), layout="constrained")
    figure.suptitle(title)
    lines = {}
    for point in points:
        rest = ", ".join(f"{k} {v:g}" for k, v in point["settings"].items() if k != "guidance")
        lines.setdefault(rest, []).append(point["figures"] | point["settings"])
    for axis, (x, y) in zip(axes, pairs):
        for label, line in lines.items():
            line = [p for p in sorted(line, key=lambda p: p["guidance"]) if None not in (p.get(x), p.get(y))]
            axis.plot([p[x] for p in line], [p[y] for p in line], "o-", label=label)
            for p in line:
                axis.annotate(f"{p['guidance']:g}", (p[x], p[y]), fontsize=7)
        axis.set_xlabel(x)
        axis.set_ylabel(y)
    axes[0].legend(fontsize=7)
    _save(figure, path)


def _save(figure, path):
    try:
        with made(path) as part:
            figure.savefig(part, format="png", dpi=110)
    finally:
        _pyplot().close(figure)


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("the report needs matplotlib: pip install matplotlib, or give --no-report") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _short(value):
    if isinstance(value, dict):
        return ", ".join(f"{k} {_short(v)}" for k, v in value.items())
    if isinstance(value, str) and len(value) > 40 and " " not in value and "/" not in value:
        return value[:16] + "..."
    return f"{value:g}" if isinstance(value, float) else str(value)


def _wrapped(lines, width=88):
    for block in lines:
        for line in block.split("\n"):
            for first in range(0, max(len(line), 1), width):
                yield line[first : first + width]
