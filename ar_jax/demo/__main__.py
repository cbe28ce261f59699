"""Opens a page to draw with a model: classes or captions, all parts of its sampling, pictures while they are made, holes
and frames painted with the mouse, two settings side by side, and a link that holds it all.

    python -m ar_jax.demo RUN [--name value ...]

    python -m ar_jax.demo runs/mnist5k_llamagen
    python -m ar_jax.demo checkpoints/c2i_B_256 --tokenizer checkpoints/vq_ds16_c2i --guidance 4
    python -m ar_jax.demo RUN --host 0.0.0.0        for others on the network; it asks nobody who they are

Options are those of sample.py, and what the page begins with. Needs `pip install 'ar_jax[demo]'`. The page runs on the first
device; several visitors queue.
"""

import dataclasses
import sys
import tempfile
import threading
from pathlib import Path
from typing import Annotated

import tyro

from ar_jax.data import Data, open_source
from ar_jax.demo.easel import Easel, Request
from ar_jax.demo.settings import Board, Wish
from ar_jax.files.models import Model
from ar_jax.files.places import reachable
from ar_jax.files.trust import taken
from ar_jax.machine import distributed
from ar_jax.machine.compiled import keep_compiled
from ar_jax.machine.huge_pages import use_huge_pages
from ar_jax.options import Sampler, options_of

SUGGESTED = 8  # captions of the data


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Sampler):
    """What to open, and where."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder of train.py, or folder of a converted generator."""
    host: str = "127.0.0.1"
    """Address to listen on: this machine alone, unless told otherwise."""
    port: int = 7860
    """Port to listen on; 0 takes any that is free."""
    ahead: bool = True
    """Compile the programs of the first drawing while nobody has asked for one."""


def main(arguments: list[str]) -> None:
    if not arguments:
        raise SystemExit(__doc__)
    with distributed.command("ar_jax.demo"):
        own, arguments = options_of(reachable(taken(arguments)))
        default = Options(run=tyro.MISSING, sampling=own.sampling, fields=own.fields)
        options = tyro.cli(
            Options, args=arguments, default=default, prog="ar_jax.demo", description=__doc__,
            config=(tyro.conf.AvoidSubcommands,),
        )  # fmt: skip
        try:
            from ar_jax.demo import page
        except ImportError as error:
            raise ValueError(
                f"the page is made with gradio, which cannot be imported ({error}); pip install 'gradio>=6'"
            ) from error
        keep_compiled()
        easel = Easel(options.run, options)
        board = Board(easel.drawer)
        suggestions = captions(easel.drawer.model)
        with tempfile.TemporaryDirectory(prefix="ar_jax-demo-") as folder:
            opened = page.Page(easel, board, suggestions, Path(folder))
            if options.ahead:
                wish = Wish(captions=tuple(suggestions[:2]))
                request = Request(board.sampling(wish.choice), (), wish.captions, wish.count, wish.seed)
                threading.Thread(target=_all, args=(easel, request), daemon=True).start()
            address = page.launch(opened, options.host, options.port, block=False)
            print(f"{opened.name}: {address} (Ctrl-C ends it)", flush=True)
            if options.host not in ("127.0.0.1", "localhost"):
                print("everybody who reaches this address may draw; there is no password", flush=True)
            try:
                opened.blocks.block_thread()
            finally:
                opened.blocks.close()


def captions(model: Model) -> list[str]:
    """Some captions of the data that a model was trained on, where these are still at hand."""
    if not (model.info.text_width and model.settings.get("data")):
        return []
    try:
        source = open_source(Data(**model.settings["data"]))
        every = list(source.captions())
    except (ValueError, OSError, AttributeError, TypeError):
        return []
    return every[:: max(1, len(every) // SUGGESTED)][:SUGGESTED]


def _all(easel: Easel, request: Request) -> None:
    try:
        for _ in easel.draw(request):
            pass
    except ValueError as error:  # who asks for it is told again
        print(f"ar_jax.demo: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    use_huge_pages()
    main(sys.argv[1:])
