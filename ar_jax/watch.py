"""Writes a run as one HTML page, which needs nothing beside it: curves, pictures over time, settings, warnings.

    python -m ar_jax.watch RUN [--out FILE.html] [--every SECONDS]

    python -m ar_jax.watch runs/mnist5k_llamagen                 runs/mnist5k_llamagen/watch.html
    python -m ar_jax.watch runs/mnist5k_llamagen --every 60      anew every minute, until the training is done

It reads what train.py leaves in the run folder (metrics.jsonl, messages.jsonl, samples/, run.json), runs no code of it and
asks nothing of the devices. The page opens from disk, from a mail or behind any web server.
"""

import base64
import dataclasses
import html
import io
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro
from PIL import Image

from ar_jax.config import CONFIGS, find_config, load_config
from ar_jax.data.base import Unreadable
from ar_jax.data.images import read_image
from ar_jax.files import codec
from ar_jax.files.places import made, path_of, reachable, resolved
from ar_jax.machine import distributed

STAGES = "tokenizer", "generator"
FIRST = (  # charts in this order; what is not among them comes below
    "loss", "psnr", "ssim", "fd", "perplexity", "usage", "code_perplexity", "lr", "grad_norm", "images_per_second", "mfu",
    "input_wait", "memory_gib",
)  # fmt: skip
KINDS = ("held_out", "train_sample", "evaluation")  # what names of figures begin with, beside those of training
UNSEEN = ("skipped", "skipped_in_a_row", "steps_per_second", "images_per_second_per_chip")  # said elsewhere, or twice
POINTS = 600  # of a curve
PICTURES, WIDE = 12, 720  # of a stage, and their most pixels a side
QUIET = 1800  # seconds without a word after which an unfinished run is asked after
COLOURS = ("#d9480f", "#1c7ed6", "#2b8a3e", "#9c36b5", "#e67700", "#0b7285", "#c2255c", "#495057")


@dataclasses.dataclass(frozen=True)
class Options:
    """What to read and where to put it."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder of train.py."""
    out: str = ""
    """File to write; left out, watch.html in the run folder."""
    every: float = 0.0
    """Write it anew every so many seconds until the training is done, and let the browser do so too; 0 writes it once."""


def main(arguments: list[str]) -> None:
    if not arguments:
        raise SystemExit(__doc__)
    with distributed.command("ar_jax.watch"):
        options = tyro.cli(Options, args=reachable(arguments), prog="ar_jax.watch", description=__doc__)
        run = path_of(options.run)
        if options.every < 0 or not math.isfinite(options.every):
            raise ValueError(f"--every is {options.every}; it must be a number of seconds, or 0 to write once")
        out = path_of(options.out) if options.out else run / "watch.html"
        while True:
            stages = read(run)
            done = all(stage.step >= stage.steps > 0 for stage in stages)
            text = page(run, stages, 0 if done else options.every)
            with made(out) as part:
                part.write_text(text, encoding="utf-8")
            told = ", ".join(f"{stage.name} {stage.step} of {stage.steps or '?'}" for stage in stages)
            print(f"{out}: {told}", flush=True)
            if not options.every or done:
                return
            time.sleep(options.every)


@dataclasses.dataclass(frozen=True)
class Watched:
    """What a stage of a run has written.

    Attributes:
      name: "tokenizer" or "generator".
      steps: updates asked for; 0 where that is not known.
      curves: by name, updates and values; of an update that was made twice (after a resumption) the later one counts.
      warnings: one line each.
      pictures: update and file.
      heard: when it last wrote, seconds since 1970; 0 never.
    """

    name: str
    steps: int
    curves: dict[str, dict[int, float]]
    warnings: list[str]
    pictures: list[tuple[int, Path]]
    heard: float

    @property
    def step(self) -> int:
        """The last update that was told of."""
        return max((max(points) for points in self.curves.values() if points), default=0)


def read(run: Path) -> list[Watched]:
    """The stages of a run that have written something.

    Raises:
      ValueError: no such run, or a line of its log that is none.
    """
    facts = facts_of(run)
    stages = [_stage(run / name, facts.get("experiment", {}).get(name, {})) for name in STAGES if (run / name).is_dir()]
    stages = [stage for stage in stages if stage.curves or stage.pictures]
    if not stages:
        raise ValueError(f"{run} holds no metrics.jsonl of a training; give the run folder of train.py")
    return stages


def facts_of(run: Path) -> dict[str, Any]:
    """What run.json says: config, overrides, versions, experiment."""
    if not (run / "run.json").is_file():
        return {}
    facts = codec.read_json(run / "run.json")
    return facts if isinstance(facts, dict) else {}


def _stage(folder, asked):
    curves, warnings = {}, []
    for number, line in enumerate(_lines(folder / "metrics.jsonl"), 1):
        step = line.pop("step", None)
        if not isinstance(step, int):
            raise ValueError(f"{folder / 'metrics.jsonl'}, line {number}: step is {step!r}; it must be a whole number")
        missing = [name for name, value in line.items() if value is None]
        if line.get("skipped_in_a_row"):
            warnings.append(f"update {step} was skipped: its loss or gradients were not finite")
        elif missing:
            warnings.append(f"update {step}: {', '.join(missing)} not finite")
        if "spike/loss" in line:
            warnings.append(
                f"update {step}: loss spike, {line['spike/loss']:.4g} where the mean was {line['spike/mean']:.4g}"
            )
        for name, value in line.items():
            if isinstance(value, int | float):
                curves.setdefault(name, {})[step] = value
    said = [str(line.get("message", "")) for line in _lines(folder / "messages.jsonl")]
    warnings += [message for message in said if "loss spike" not in message and ": skipped," not in message]
    pictures = [(int(file.stem), file) for file in (folder / "samples").glob("*.png") if file.stem.isdecimal()]
    written = [_heard(file) for name in ("metrics.jsonl", "messages.jsonl") if (file := folder / name).exists()]
    steps = asked.get("steps", 0) if isinstance(asked, dict) else 0
    return Watched(
        folder.name, steps if isinstance(steps, int) else 0, curves, warnings, sorted(pictures), max(written, default=0)
    )


def _heard(file: Path) -> float:
    stat = file.stat()
    return stat.st_mtime if isinstance(file, Path) else stat.mtime  # etils' in a bucket


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """JSON objects, one a line; a last line that is being written is left out."""
    if not file.is_file():
        return
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line) if line.strip() else None
        except ValueError as error:
            if number == len(lines):
                return
            raise ValueError(f"{file}, line {number} is no JSON: {error}") from error
        if isinstance(value, dict):
            yield value


# The page


def page(run: Path, stages: list[Watched], every: float = 0.0) -> str:
    """The HTML of a run."""
    facts, now = facts_of(run), time.time()
    name = html.escape(resolved(run).name)
    charts, parts = [], [f"<h1>{name}</h1>", _head(facts, now)]
    warnings = [(stage.name, warning) for stage in stages for warning in [*stage.warnings, *_silent(stage, now)]]
    if warnings:
        shown = "".join(f"<li><b>{stage}</b> {html.escape(warning)}</li>" for stage, warning in warnings[-50:])
        more = f" (the last 50 of {len(warnings)})" if len(warnings) > 50 else ""
        parts.append(
            f'<details class="warn" open><summary>{len(warnings)} to look at{more}</summary><ul>{shown}</ul></details>'
        )
    for stage in stages:
        parts.append(f"<h2>{stage.name}</h2>{_tiles(stage)}{_pictures(stage)}")
        first, others = _charts(stage, charts)
        parts.append(f'<div class="charts">{first}</div>')
        if others:
            parts.append(f'<details><summary>more figures</summary><div class="charts">{others}</div></details>')
    parts += [_differences(facts), _all_settings(facts)]
    refresh = f'<meta http-equiv="refresh" content="{max(1, round(every))}">' if every else ""
    data = json.dumps(charts).replace("<", "\\u003c")
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">{refresh}<title>{name}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}"
        f'<script type="application/json" id="data">{data}</script><script>{SCRIPT}</script></body></html>\n'
    )


def _head(facts, now):
    command = " ".join(map(str, ["train.py", facts.get("config", "?"), *facts.get("overrides", [])]))
    versions = facts.get("versions", {})
    told = ", ".join(f"{name} {version}" for name, version in versions.items()) if isinstance(versions, dict) else ""
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime(now))
    return f"<p><code>{html.escape(command)}</code></p><p class='dim'>{html.escape(told)}; written {written}</p>"


def _silent(stage, now):
    if stage.steps and stage.step < stage.steps and now - stage.heard > QUIET:
        yield f"not finished, and nothing was written for {(now - stage.heard) / 3600:.1f} hours: is it still running?"
    if any(name.startswith("train_sample/") for name in stage.curves):
        yield "no held-out images: figures and pictures are of training images"


def _tiles(stage):
    tiles = [("update", f"{stage.step:,} of {stage.steps:,}" if stage.steps else f"{stage.step:,}")]
    for name in ("loss", "psnr", "images_per_second", "mfu", "usage", "memory_gib"):
        for kind in ("", *(f"{kind}/" for kind in KINDS)):
            if points := stage.curves.get(kind + name):
                tiles.append((kind + name, f"{points[max(points)]:.4g}"))
    pace = stage.curves.get("seconds_per_step")
    if pace and stage.step < stage.steps:
        tiles.append(("left", _span((stage.steps - stage.step) * pace[max(pace)])))
    return (
        '<div class="tiles">'
        + "".join(f"<div><span>{html.escape(a)}</span><b>{b}</b></div>" for a, b in tiles)
        + "</div>"
    )


def _span(seconds):
    return f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{seconds / 60:.0f} minutes"


def _pictures(stage):
    """Pictures spread over the training, the last one among them."""
    chosen = stage.pictures
    if len(chosen) > PICTURES:
        chosen = [chosen[round(i * (len(chosen) - 1) / (PICTURES - 1))] for i in range(PICTURES)]
    shown = []
    for step, file in reversed(chosen):
        try:
            image = read_image(file)
        except Unreadable:
            continue
        if max(image.size) > WIDE:
            image.thumbnail((WIDE, WIDE), Image.Resampling.LANCZOS)
        text = base64.b64encode(_encoded(image)).decode()
        shown.append(
            f'<figure><img alt="update {step}" src="data:image/webp;base64,{text}"><figcaption>{step:,}</figcaption></figure>'
        )
    return f'<div class="strip">{"".join(shown)}</div>' if shown else ""


def _encoded(image):
    file = io.BytesIO()
    image.save(file, format="WEBP", quality=85)
    return file.getvalue()


def _charts(stage, charts):
    """SVG of the first charts and of the others; their points are appended to `charts`, for the script."""
    by_name: dict[str, dict[str, dict[int, float]]] = {}
    for name, points in stage.curves.items():
        kind, slash, rest = name.partition("/")
        kind, title = (kind, rest) if slash and kind in KINDS else ("", name)
        base, slash, part = title.partition("/")  # usage/3: the fourth scale or sub-code
        if slash and part.isdecimal():
            title, kind = f"{base} by part", f"{part} {kind}".strip()
        if points and base not in UNSEEN and base != "spike":
            by_name.setdefault(title, {})[kind or "training"] = points
    rank = {name: i for i, name in enumerate(FIRST)}
    titles = sorted(by_name, key=lambda title: (rank.get(title.removesuffix(" by part"), len(FIRST)), title))
    made = {title: _chart(title, by_name[title], stage, charts) for title in titles}
    split = [title for title in titles if title.removesuffix(" by part") in rank]
    return "".join(made[title] for title in split), "".join(made[title] for title in titles if title not in split)


def _chart(title, series, stage, charts):
    width, height, left, bottom, top = 420, 220, 62, 22, 10
    series = {name: _thinned(points) for name, points in series.items()}
    values = sorted(y for points in series.values() for _, y in points)
    # the first few points of a loss would flatten all others
    low, high = values[0], values[min(len(values) - 1, math.ceil(0.995 * len(values)))]
    if high <= low:
        low, high = low - abs(low) * 0.1 - 1e-9, high + abs(high) * 0.1 + 1e-9
    last = max(stage.step, 1)

    def place(step, value):
        y = top + (height - top - bottom) * (1 - (min(value, high) - low) / (high - low))
        return f"{left + (width - left - 8) * step / last:.1f},{y:.1f}"

    drawn = ""
    for mark in (low + (high - low) * i / 4 for i in range(5)):
        y = place(0, mark).partition(",")[2]
        drawn += f'<line x1="{left}" x2="{width - 8}" y1="{y}" y2="{y}" class="grid"/>'
        drawn += f'<text x="{left - 6}" y="{y}" class="tick y">{mark:.3g}</text>'
    for step, anchor in ((0, "start"), (last // 2, "middle"), (last, "end")):
        x = place(step, low).partition(",")[0]
        drawn += f'<text x="{x}" y="{height - 6}" class="tick" text-anchor="{anchor}">{step:,}</text>'
    named = []
    for name, points in series.items():
        part, _, kind = name.rpartition(" ") if name.split(" ")[0].isdecimal() and " " in name else (name, "", "")
        which = int(part) if part.isdecimal() else ("training", *KINDS).index(name)
        colour, dash = COLOURS[which % len(COLOURS)], ' stroke-dasharray="5 3"' * bool(kind)
        drawn += (
            f'<polyline points="{" ".join(place(*point) for point in points)}" stroke="{colour}" class="line"{dash}/>'
        )
        if len(points) < 40:
            for x, y in (place(*point).split(",") for point in points):
                drawn += f'<circle r="2.2" fill="{colour}" cx="{x}" cy="{y}"/>'
        if name != "training" or len(series) > 1:
            named.append(f'<span style="color:{colour}">{html.escape(name)}{" - -" * bool(kind)}</span>')
    charts.append({"left": left, "right": width - 8, "last": last, "series": series})
    return (
        f'<div class="chart" data-chart="{len(charts) - 1}"><h3>{html.escape(title)}</h3><svg viewBox="0 0 {width} {height}">{drawn}'
        f'<line class="hair" y1="{top}" y2="{height - bottom}"/></svg><p>{" ".join(named)}</p><p class="told"></p></div>'
    )


def _thinned(points: dict[int, float]) -> list[tuple[int, float]]:
    """At most so many points of a curve, the last one among them."""
    steps = sorted(points)
    every = math.ceil(len(steps) / POINTS)
    return [(step, points[step]) for step in steps[(len(steps) - 1) % every :: every]]


def _differences(facts):
    """How the run differs from the published config that it names."""
    name, experiment = facts.get("config"), facts.get("experiment")
    if not isinstance(name, str) or not isinstance(experiment, dict):
        return ""
    try:
        file, _ = find_config(name)
        if not file.resolve().is_relative_to(CONFIGS.resolve()):
            return f"<h2>Settings</h2><p>{html.escape(name)} is a config of one's own: nothing published to compare with.</p>"
        published = _flat(codec.encode(load_config(name)))
    except (ValueError, OSError):
        return ""
    own = _flat(experiment)
    rows = [
        (path, own.get(path, "-"), published.get(path, "-"))
        for path in {**published, **own}
        if own.get(path, "-") != published.get(path, "-")
    ]
    if not rows:
        return f"<h2>Settings</h2><p>All are those of <code>{html.escape(name)}</code>, as published.</p>"
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f"<h2>Settings</h2><p>{len(rows)} differ from <code>{html.escape(name)}</code> as this version publishes it:</p>"
        f"<table><tr><th>setting</th><th>here</th><th>published</th></tr>{cells}</table>"
    )


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Leaves of nested objects by their path."""
    if not isinstance(value, dict) or not value:
        return {path: json.dumps(value) if isinstance(value, list | dict) else value}
    return {
        name: leaf for key, inner in value.items() for name, leaf in _flat(inner, f"{path}.{key}".lstrip(".")).items()
    }


def _all_settings(facts):
    if "experiment" not in facts:
        return ""
    text = html.escape(json.dumps(facts["experiment"], indent=1))
    return f"<details><summary>all settings</summary><pre>{text}</pre></details>"


STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #888; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1340px; margin: 24px auto; padding: 0 20px; }
h1 { margin-bottom: 0; } h2 { margin-top: 36px; border-bottom: 1px solid var(--line); } h3 { margin: 0 0 4px; font-size: 14px; }
code { background: #8882; padding: 1px 5px; border-radius: 4px; } .dim { color: var(--dim); font-size: 13px; }
.warn { border-left: 4px solid #e67700; padding: 6px 14px; background: #e6770018; margin: 16px 0; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; margin: 12px 0; }
.tiles div { border: 1px solid var(--line); border-radius: 6px; padding: 6px 12px; }
.tiles span { display: block; font-size: 12px; color: var(--dim); } .tiles b { font-size: 17px; font-variant-numeric: tabular-nums; }
.strip { display: flex; gap: 14px; overflow-x: auto; padding-bottom: 8px; }
figure { margin: 0; flex: none; } figure img { height: 190px; image-rendering: pixelated; border: 1px solid var(--line); }
figcaption { text-align: center; font-size: 12px; color: var(--dim); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(390px, 1fr)); gap: 18px; margin-top: 14px; }
.chart { border: 1px solid var(--line); border-radius: 6px; padding: 10px 12px; } .chart svg { width: 100%; display: block; }
.chart p { margin: 0; font-size: 12px; min-height: 1.2em; } .chart p span { margin-right: 10px; }
.line { fill: none; stroke-width: 1.6; stroke-linejoin: round; } .grid { stroke: var(--line); } .hair { stroke: #888; visibility: hidden; }
.tick { font-size: 10.5px; fill: var(--dim); } .tick.y { text-anchor: end; dominant-baseline: middle; } 
table { border-collapse: collapse; } td, th { border: 1px solid var(--line); padding: 3px 10px; text-align: left; font-size: 13px; }
pre { overflow-x: auto; font-size: 12px; } summary { cursor: pointer; }
"""
SCRIPT = """
const charts = JSON.parse(document.getElementById('data').textContent);
for (const box of document.querySelectorAll('.chart')) {
  const {left, right, last, series} = charts[box.dataset.chart], svg = box.querySelector('svg');
  const hair = box.querySelector('.hair'), told = box.querySelector('.told');
  svg.addEventListener('pointermove', (event) => {
    const at = svg.createSVGPoint();
    [at.x, at.y] = [event.clientX, event.clientY];
    const x = Math.min(Math.max(at.matrixTransform(svg.getScreenCTM().inverse()).x, left), right);
    const step = (x - left) / (right - left) * last;
    for (const name of ['x1', 'x2']) hair.setAttribute(name, x);
    hair.style.visibility = 'visible';
    told.textContent = Object.entries(series).map(([name, points]) => {
      const near = points.reduce((a, b) => Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a);
      return `${name} ${near[1].toPrecision(4)} at ${near[0]}`;
    }).join('; ');
  });
  svg.addEventListener('pointerleave', () => { hair.style.visibility = 'hidden'; told.textContent = ''; });
}
"""

if __name__ == "__main__":
    main(sys.argv[1:])
