"""The canvas of the page: an image that is moved and enlarged under a frame, and a brush that paints holes.

The browser part (`HTML`, `CSS`, `SCRIPT`) says what was done as JSON: the image as it was chosen, where it lies and the
holes, white on black. What it says is a stranger's word: `read` looks at all of it.
"""

import base64
import io
import json
import math
from typing import Any

import numpy as np
from PIL import Image

from ar_jax.data.base import Unreadable
from ar_jax.data.images import read_image
from ar_jax.files.words import shown
from ar_jax.sampler import Given

LARGEST = 20_000_000  # bytes of an image file, and a little less of it as text
SIDE = 320  # pixels of the canvas' longer side
ZOOM = 0.1, 8.0


def read(message: str, shape: tuple[int, int, int], scales: int = 0, paste: bool = True) -> Given:
    """What is kept of an image, and what is drawn: where the frame reaches beyond it, and its holes.

    Args:
      message: JSON with "image" and "hole" (data URLs; a hole is white, over the whole frame), "zoom" (1 lets
        the image just fill the frame) and "at", the place of its top left corner as parts of the frame's height and width.
      shape: height, width and channels of the model's images.
      scales, paste: see `Given`.
    Raises:
      ValueError: no image, one that cannot be read, or nothing to draw.
    """
    image, hole, zoom, (top, left) = _parsed(message)
    height, width, channels = shape
    image = _image(image, "the image")
    factor = max(height / image.height, width / image.width) * zoom
    top, left = top * height, left * width
    # pixels of the frame that the image reaches to, and where they lie in the image
    rows = _reach(top, image.height * factor, height)
    columns = _reach(left, image.width * factor, width)
    pixels, free = np.full((height, width, 3), 128, np.uint8), np.ones((height, width), bool)
    if rows[1] > rows[0] and columns[1] > columns[0]:
        box = [
            min(max((edge - start) / factor, 0), limit)
            for edge, start, limit in (
                (columns[0], left, image.width), (rows[0], top, image.height),
                (columns[1], left, image.width), (rows[1], top, image.height),
            )
        ]  # fmt: skip
        inside = slice(*rows), slice(*columns)
        size = columns[1] - columns[0], rows[1] - rows[0]
        pixels[inside] = image.resize(size, Image.Resampling.BICUBIC, box=box)
        free[inside] = False
    if hole:
        hole = _image(hole, "the hole").convert("L").resize((width, height), Image.Resampling.BOX)
        free |= np.asarray(hole) > 64
    if scales and not free.any():
        free[:] = True
    if not free.any():
        raise ValueError(
            "all of the image is kept, so nothing is left to draw: paint a hole, or move the image in its frame"
        )
    if free.all() and not scales:
        raise ValueError("nothing of the image is kept; leave some of it, or draw without it")
    if channels == 1:
        pixels = pixels.mean(-1, keepdims=True).astype(np.uint8)
    return Given(pixels, free, scales, paste)


def _reach(start: float, length: float, limit: int) -> tuple[int, int]:
    """First and last pixel of a frame that lie wholly in a span, to a hundredth of a pixel."""
    first, last = math.ceil(start - 0.01), math.floor(start + length + 0.01)
    return min(max(first, 0), limit), min(max(last, 0), limit)


def _parsed(message):
    """The image, the hole ("" without), zoom and place of a message."""
    try:
        said = json.loads(message or "{}")
    except (TypeError, ValueError) as error:
        raise ValueError(f"the canvas says what is no JSON: {error}") from error
    if not isinstance(said, dict) or not said.get("image"):
        raise ValueError("there is no image on the canvas; choose a file, or take one that was drawn")
    zoom, at = said.get("zoom", 1.0), said.get("at", (0.0, 0.0))
    if not isinstance(at, list | tuple) or len(at) != 2 or not all(map(_moderate, (zoom, *at))):
        raise ValueError(
            f"zoom and at of the canvas are {shown(zoom)} and {shown(at)}; they must be a number and two numbers"
        )
    if not ZOOM[0] <= zoom <= ZOOM[1]:
        raise ValueError(f"zoom of the canvas is {zoom:g}; it must be {ZOOM[0]:g} to {ZOOM[1]:g}")
    return said["image"], said.get("hole") or "", zoom, at


def _moderate(number):
    return isinstance(number, int | float) and abs(number) < 1e4


def _image(url: Any, what: str) -> Image.Image:
    """An image from a data URL, by the reader of strangers' images."""
    kind, comma, text = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not comma or not kind.endswith(";base64"):
        raise ValueError(f"{what} on the canvas is no data URL")
    if len(text) > LARGEST * 4 // 3:
        raise ValueError(f"{what} on the canvas has more than {LARGEST // 10**6} MB; give a smaller file")
    try:
        content = base64.b64decode(text, validate=True)
        return read_image(io.BytesIO(content), what)
    except Unreadable as error:
        raise ValueError(f"{what} on the canvas cannot be read: {error.reason}") from error
    except ValueError as error:
        raise ValueError(f"{what} on the canvas is no base64: {error}") from error


def message(image: np.ndarray) -> str:
    """What puts a uint8 [h w 3] image on the canvas."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return json.dumps({"image": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()})


def html(shape: tuple[int, int, int]) -> str:
    """The canvas, of the proportions of the model's images."""
    height, width, _ = shape
    sides = (round(side * SIDE / max(height, width)) for side in (width, height))
    return HTML.replace("WIDTH", str(next(sides))).replace("HEIGHT", str(next(sides)))


HTML = """
<div class="easel">
  <canvas class="view" width="WIDTH" height="HEIGHT"></canvas>
  <div class="tools">
    <div><label class="pick">Choose an image<input type="file" accept="image/*"></label></div>
    <div class="row"><button data-tool="brush">Brush</button><button data-tool="erase">Erase</button><button data-tool="move">Move</button></div>
    <label>Brush <input class="thick" type="range" min="4" max="96" value="36"></label>
    <label>Zoom <input class="zoom" type="range" min="-2" max="2" step="0.01" value="0"></label>
    <div class="row"><button data-act="fill">No hole</button><button data-act="centre">Centre</button></div>
    <p class="hint">Paint over what is to be drawn anew. Move the image or zoom out, and what it leaves of the frame is drawn.</p>
  </div>
</div>
"""

CSS = """
.easel { display: flex; gap: 14px; flex-wrap: wrap; align-items: flex-start; }
.view { border: 2px solid var(--color-accent, #888); border-radius: 4px; touch-action: none; image-rendering: pixelated;
  max-width: 100%; background: #8a8a8a; }
.tools { display: flex; flex-direction: column; gap: 8px; width: 210px; font-size: 13px; }
.tools label { display: flex; align-items: center; gap: 8px; }
.tools input[type=range] { flex: 1; min-width: 0; }
.row { display: flex; gap: 6px; }
.tools button, .pick { font: inherit; text-align: center; border: 1px solid var(--border-color-primary, #bbb); border-radius: 6px; padding: 5px 8px; cursor: pointer;
  background: var(--button-secondary-background-fill, #eee); color: inherit; flex: 1; justify-content: center; }
.tools button.on { background: var(--color-accent, #555); color: white; }
.pick input { display: none; }
.hint { opacity: 0.7; margin: 0; }
"""

SCRIPT = """
const find = (name) => element.querySelector(name);
const state = {url: '', image: null, at: [0, 0], zoom: 1, tool: 'brush', from: null};
const hole = document.createElement('canvas');
const sides = () => [find('.view').width, find('.view').height];
[hole.width, hole.height] = sides();
const pen = hole.getContext('2d', {willReadFrequently: true});

function extent() {  // of the image, as parts of the frame's height and width
  const [w, h] = sides(), factor = Math.max(h / state.image.height, w / state.image.width) * state.zoom;
  return [state.image.height * factor / h, state.image.width * factor / w];
}
function paint() {
  const view = find('.view'), [w, h] = sides(), brush = view.getContext('2d');
  brush.fillStyle = '#8a8a8a';
  brush.fillRect(0, 0, w, h);
  brush.strokeStyle = '#9c9c9c';
  for (let x = -h; x < w; x += 12) { brush.beginPath(); brush.moveTo(x, h); brush.lineTo(x + h, 0); brush.stroke(); }
  if (state.image) {
    brush.imageSmoothingEnabled = state.image.width > 128;
    const [high, wide] = extent();
    brush.drawImage(state.image, state.at[1] * w, state.at[0] * h, wide * w, high * h);
  }
  brush.globalAlpha = 0.75;
  brush.drawImage(hole, 0, 0);
  brush.globalAlpha = 1;
  for (const button of element.querySelectorAll('[data-tool]')) button.classList.toggle('on', button.dataset.tool === state.tool);
}
function empty() { return !new Uint32Array(pen.getImageData(0, 0, ...sides()).data.buffer).some((x) => x); }
function mask() {  // white on black
  const copy = document.createElement('canvas');
  [copy.width, copy.height] = sides();
  const brush = copy.getContext('2d');
  brush.drawImage(hole, 0, 0);
  brush.globalCompositeOperation = 'source-in';
  brush.fillStyle = 'white';
  brush.fillRect(0, 0, ...sides());
  brush.globalCompositeOperation = 'destination-over';
  brush.fillStyle = 'black';
  brush.fillRect(0, 0, ...sides());
  return copy.toDataURL();
}
function say() {
  paint();
  props.value = JSON.stringify({image: state.url, zoom: state.zoom, at: state.at, hole: empty() ? '' : mask()});
}
function centre() {
  const [high, wide] = extent();
  state.at = [(1 - high) / 2, (1 - wide) / 2];
}
function show(url) {
  const image = new Image();
  image.onload = () => {
    Object.assign(state, {url, image, zoom: 1});
    find('.zoom').value = 0;
    pen.clearRect(0, 0, ...sides());
    centre();
    say();
  };
  image.src = url;
}
function place(event) {
  const view = find('.view'), box = view.getBoundingClientRect();
  return [(event.clientX - box.left) * view.width / box.width, (event.clientY - box.top) * view.height / box.height];
}
function stroke(from, to) {
  pen.globalCompositeOperation = state.tool === 'erase' ? 'destination-out' : 'source-over';
  pen.strokeStyle = '#e8552d';
  pen.lineWidth = Number(find('.thick').value);
  pen.lineCap = 'round';
  pen.beginPath();
  pen.moveTo(...from);
  pen.lineTo(to[0] + 0.01, to[1]);
  pen.stroke();
}
element.addEventListener('pointerdown', (event) => {
  if (!event.target.classList.contains('view') || !state.image) return;
  event.target.setPointerCapture(event.pointerId);
  state.from = place(event);
  if (state.tool !== 'move') { stroke(state.from, state.from); paint(); }
});
element.addEventListener('pointermove', (event) => {
  if (!state.from) return;
  const to = place(event), [w, h] = sides();
  if (state.tool === 'move') {
    state.at = [state.at[0] + (to[1] - state.from[1]) / h, state.at[1] + (to[0] - state.from[0]) / w];
  } else stroke(state.from, to);
  state.from = to;
  paint();
});
element.addEventListener('pointerup', () => { if (state.from) { state.from = null; say(); } });
element.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (!button) return;
  if (button.dataset.tool) { state.tool = button.dataset.tool; paint(); }
  if (button.dataset.act === 'fill') { pen.clearRect(0, 0, ...sides()); say(); }
  if (button.dataset.act === 'centre' && state.image) { state.zoom = 1; find('.zoom').value = 0; centre(); say(); }
});
element.addEventListener('input', (event) => {
  if (!event.target.classList.contains('zoom') || !state.image) return;
  const before = extent();
  state.zoom = 2 ** Number(event.target.value);
  const after = extent();
  state.at = state.at.map((x, i) => 0.5 + (x - 0.5) * after[i] / before[i]);
  say();
});
element.addEventListener('change', (event) => {
  if (event.target.type !== 'file' || !event.target.files.length) return;
  const reader = new FileReader();
  reader.onload = () => show(reader.result);
  reader.readAsDataURL(event.target.files[0]);
});
watch('value', () => {
  let said = {};
  try { said = JSON.parse(props.value || '{}'); } catch { return; }
  if (said.image && said.image !== state.url) show(said.image);
  paint();
});
paint();
"""
