"""The page: gradio's components around `settings`, `easel` and `canvas`, and nothing that could be done without it."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import jax
import numpy as np

from ar_jax.demo import canvas, pictures
from ar_jax.demo.easel import MOST, Easel, Request
from ar_jax.demo.settings import Board, Choice, Setting, Wish
from ar_jax.files import codec

CSS = """
.gradio-container { max-width: 1240px !important; margin: auto; }
.drawn img { image-rendering: pixelated; width: 100%; object-fit: contain; }
.drawn .grid-wrap { max-height: none !important; height: auto !important; min-height: 0 !important; }
.told { min-height: 1.6em; }
footer { display: none !important; }
"""
THEME = gr.themes.Default(  # with fonts of the machine: the page asks no other server for anything
    primary_hue="orange", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], radius_size="sm"
)


class Page:
    """A page for one model.

    Attributes:
      blocks: to launch.
    """

    def __init__(self, easel: Easel, board: Board, suggestions: list[str], folder: Path):
        """Lays out the page.

        Args:
          suggestions: captions of the data, for models that take captions.
          folder: for files of what was drawn; those of the last 64 drawings stay.
        """
        self.easel, self.board, self.folder = easel, board, folder
        self.model, self.count = easel.drawer.model, itertools.count()
        with gr.Blocks(title=f"{self.name} - ar_jax", analytics_enabled=False, delete_cache=(600, 3600)) as self.blocks:
            gr.Markdown(f"## {self.name}\n{self._facts()}")
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    self.words = self._words(suggestions)
                    with gr.Row():
                        self.number = gr.Slider(1, MOST, Wish().count, step=1, label="count", info="Images.")
                        self.seed = gr.Textbox(
                            str(Wish().seed), label="seed", info="Image i depends on it and on i only."
                        )
                    draw = gr.Button("Draw", variant="primary", elem_id="draw")
                    self.first = self._panel("Settings")
                    self.compare = gr.Checkbox(label="Compare with other settings, same seed", elem_id="compare")
                    with gr.Column(visible=False) as beside:
                        self.second = self._panel("The other settings")
                with gr.Column(scale=3, min_width=420):
                    with gr.Row():
                        shown, other = self._result("", True), self._result("other-", False)
                    self.link = gr.Textbox(
                        label="Link to these settings", buttons=["copy"], interactive=False, elem_id="link"
                    )
                    gr.Markdown(
                        "### Fill a hole, extend an image\nClick a picture above to put it here, or choose a file."
                    )
                    self.canvas = gr.HTML(
                        "", html_template=canvas.html(easel.shape), css_template=canvas.CSS, js_on_load=canvas.SCRIPT,
                        apply_default_css=False, elem_id="canvas",
                    )  # fmt: skip
                    with gr.Row():
                        scales = len(easel.drawer.decoder.spec.scales)
                        self.kept = gr.Slider(
                            0, max(scales - 1, 1), 0, step=1, label="scales kept", visible=scales > 1,
                            info="So many first scales are the image's own; with a whole image, only finer ones are drawn anew.",
                        )  # fmt: skip
                        self.paste = gr.Checkbox(
                            True,
                            label="paste",
                            info="Kept pixels are the image's own, not what the tokenizer makes of them.",
                        )
                    fill = gr.Button("Fill", variant="primary", elem_id="fill")
            self.address = gr.Textbox(visible=False)  # of the page, as the browser has it
            self.outputs = [*shown, *other, self.link]
            self.inputs = [
                self.address, self.words, self.number, self.seed, self.canvas, self.kept, self.paste, self.compare,
                *self.first, *self.second,
            ]  # fmt: skip
            private = {"api_visibility": "private", "show_progress": "minimal"}
            one = {"concurrency_id": "drawing", "concurrency_limit": 1, **private}
            draw.click(self.drawing, self.inputs, self.outputs, **one)
            fill.click(self.filling, self.inputs, self.outputs, **one)
            self.compare.change(
                lambda on: [gr.update(visible=on)] * 2, self.compare, [beside, other[0].parent], **private
            )
            for images, *_, drawn in (shown, other):
                images.select(self.taken, drawn, self.canvas, **private)
            address = "(link) => { window.history.replaceState(null, '', link); }"
            self.link.change(None, self.link, None, js=address, api_visibility="private")
            restored = [
                self.address, self.words, self.number, self.seed, self.compare, *self.first, *self.second, shown[1],
            ]  # fmt: skip
            self.blocks.load(
                self.opened,
                self.address,
                restored,
                js="() => window.location.href",
                **private | {"show_progress": "hidden"},
            )
            self.blocks.queue(max_size=64)

    @property
    def name(self) -> str:
        folder = self.model.folder.resolve()
        return folder.parent.name if folder.name == "generator" else folder.name

    def _facts(self):
        spec, (height, width, _) = self.easel.drawer.generator.spec, self.easel.shape
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.model.shapes))
        of = f"codes of {' x '.join(map(str, spec.codes))}" if spec.codes else f"{spec.channels} numbers each"
        kind = type(self.easel.drawer.generator).__name__
        return f"{kind}, {count / 1e6:.3g} million parameters; {spec.n} tokens, {of}; images of {width}x{height} pixels"

    def _words(self, suggestions):
        info = self.model.info
        if info.text_width:
            words = gr.Textbox(
                "\n".join(suggestions[:2]), lines=3, label="captions", info="One a line, used in turn.", elem_id="words"
            )
            if suggestions:
                gr.Examples([[text] for text in suggestions], words, label="From the data")
            return words
        names = list(info.class_names) or [str(i) for i in range(info.classes)]
        return gr.Dropdown(
            names,
            value=[],
            multiselect=True,
            label="classes",
            info="Used in turn; none chosen means all of them.",
            elem_id="words",
        )

    def _panel(self, label):
        settings, ways, parts = self.board.settings, self.board.ways, {}
        with gr.Accordion(label):
            parts |= {name: _component(setting) for name, setting in settings.items() if setting.turned}
            with gr.Accordion("More, which compiles programs of its own", open=False):
                missing = "".join(f" Not here: {way} ({reason})." for way, reason in self.board.missing.items())
                info = "Parts: the model's own, or those of a file in configs/sampling." + missing
                way = gr.Dropdown(list(ways), value=ways[0], label="way", info=info)
                parts |= {name: _component(setting) for name, setting in settings.items() if not setting.turned}
        parts = [parts[name] for name in settings]

        def changed(way):
            return [gr.update(visible=way in setting.ways) for setting in settings.values()]

        way.input(changed, way, parts, api_visibility="private", show_progress="hidden")
        return [way, *parts]

    def _result(self, prefix, visible):
        with gr.Column(visible=visible, min_width=260):
            images = gr.Gallery(
                label="Drawn" if visible else "The other settings", format="png", columns=2, height="auto",
                object_fit="contain", elem_classes="drawn", elem_id=f"{prefix}drawn", buttons=["download", "fullscreen"],
                interactive=False,
            )  # fmt: skip
            told = gr.Markdown(elem_classes="told", elem_id=f"{prefix}told")
            file = gr.DownloadButton(
                "Download PNG, with the settings inside", visible=False, size="sm", elem_id=f"{prefix}file"
            )
            drawn = gr.State(None)  # the pictures themselves: what a browser says of files is nothing to open
        return images, told, file, drawn

    # What is done when something is clicked

    def drawing(self, *values: Any) -> Iterator[Any]:
        yield from self._drawn(values, False)

    def filling(self, *values: Any) -> Iterator[Any]:
        yield from self._drawn(values, True)

    def _drawn(self, values, edit):
        address, *values = values
        try:
            wish, (message, kept, paste) = self.wish(values)
            given = canvas.read(message, self.easel.shape, int(kept), bool(paste)) if edit else None
            choices = [choice for choice in (wish.choice, wish.other) if choice is not None]
            for place, choice in enumerate(choices):
                yield from self._one(wish, choice, given, place, f"{_before(address)}?{self.board.link(wish)}")
        except ValueError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error

    def _one(self, wish, choice, given, place, link):
        sampling = self.board.sampling(choice)
        request = Request(sampling, wish.labels, wish.captions, wish.count, wish.seed, given)
        for stage in self.easel.draw(request):
            images = file = drawn = gr.skip()
            if stage.images is not None:
                images = list(zip(stage.images, stage.names))
            if stage.done:
                facts = {
                    "run": self.name,
                    "settings": self.board.link(wish),
                    "sampling": codec.encode(sampling),
                    "seed": wish.seed,
                }
                grid, *each = pictures.save(self.folder, next(self.count) % 64, stage.images, facts, stage.names)
                drawn = stage.images
                images, file = (
                    [(str(path), name) for path, name in zip(each, stage.names)],
                    gr.update(value=str(grid), visible=True),
                )
            if not isinstance(images, list):
                shown = images
            else:
                shown = gr.update(
                    value=images,
                    columns=min(math.ceil(len(images) ** 0.5), 4 if wish.other is None else 2),
                    selected_index=None,
                )
            told, nothing = [shown, stage.note, file, drawn], [gr.skip()] * 4
            yield *(told if place == 0 else nothing), *(told if place == 1 else nothing), link

    def wish(self, values: tuple[Any, ...]) -> tuple[Wish, tuple[str, int, bool]]:
        """What the components ask for, and what concerns the canvas.

        Raises:
          ValueError: something that they do not take.
        """
        words, count, seed, message, kept, paste, compare, *rest = values
        half = len(rest) // 2
        first, second = (
            Choice(way, self.board.differing(Choice(way, dict(zip(self.board.settings, part)))))
            for way, *part in (rest[:half], rest[half:])
        )
        text = self.model.info.text_width > 0
        captions = tuple(line.strip() for line in (words or "").splitlines() if line.strip()) if text else ()
        seed = Setting("seed", int, 0, least=0, most=2**64 - 1).read(seed)
        labels = () if text else tuple(words or ())
        return Wish(labels, captions, int(count), seed, first, second if compare else None), (message, kept, paste)

    def opened(self, address: str) -> list[Any]:
        """The values that the address of the page holds."""
        told, wish = "", Wish()
        try:
            wish = self.board.read(address.partition("#")[0].partition("?")[2])
        except ValueError as error:
            told = f"This link does not fit the model: {error}"
        words = "\n".join(wish.captions) if self.model.info.text_width else list(wish.labels)
        if self.model.info.text_width and not wish.captions:
            words = gr.skip()
        panels = [self._values(choice or Choice()) for choice in (wish.choice, wish.other)]
        return [
            _before(address),
            words,
            wish.count,
            str(wish.seed),
            wish.other is not None,
            *itertools.chain(*panels),
            told,
        ]

    def _values(self, choice):
        shown = []
        for name, setting in self.board.settings.items():
            value = choice.values.get(name, setting.value)
            more = {}
            if setting.kind is float:
                low, high = _range(setting)
                more = {"minimum": min(low, value), "maximum": max(high, value)}
            shown.append(gr.update(value=value, visible=choice.way in setting.ways, **more))
        return [choice.way, *shown]

    def taken(self, drawn: np.ndarray | None, event: gr.SelectData) -> Any:
        """Puts a picture that was drawn on the canvas."""
        if drawn is None or not 0 <= event.index < len(drawn):
            return gr.skip()
        return canvas.message(drawn[event.index])


def _component(setting: Setting):
    words = {"label": setting.name, "info": setting.doc or None}
    if setting.kind is bool:
        return gr.Checkbox(setting.value, **words)
    if setting.choices:
        return gr.Dropdown(list(setting.choices), value=setting.value, **words)
    if setting.kind is float:
        return gr.Slider(*_range(setting), setting.value, step=0.01, **words)
    if setting.kind is int:
        return gr.Number(setting.value, precision=0, **words)
    return gr.Textbox(setting.value, **words)


def _range(setting):
    """Of a slider."""
    least = setting.least if math.isfinite(setting.least) else min(0.0, setting.value)
    return least, setting.most if math.isfinite(setting.most) else max(4.0, 4 * setting.value)


def _before(address):
    """An address without its query."""
    return (address or "").partition("#")[0].partition("?")[0]


def launch(page: Page, host: str, port: int, block: bool = True) -> str:
    """Opens a page and returns its address.

    Args:
      port: 0 takes any that is free.
      block: until the process is told to stop.
    """
    _, address, _ = page.blocks.launch(
        server_name=host, server_port=port or None, prevent_thread_lock=not block, quiet=True, share=False,
        theme=THEME, css=CSS, footer_links=[], max_file_size=canvas.LARGEST, show_error=True, pwa=False,
        mcp_server=False, enable_monitoring=False, ssr_mode=False, state_session_capacity=200,
    )  # fmt: skip
    return address
