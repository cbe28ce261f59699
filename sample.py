"""Draws and edits images: `python sample.py RUN`; the command is ar_jax/sample.py.

    python sample.py runs/mnist5k_llamagen             a grid, samples.png
    python sample.py RUN --help                        all settings
"""

import sys

from ar_jax.machine.huge_pages import use_huge_pages
from ar_jax.sample import main

if __name__ == "__main__":
    use_huge_pages()
    main(sys.argv[1:])
