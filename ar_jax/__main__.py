"""The commands of ar_jax, where it is installed: `ar-jax COMMAND ...` does what `python -m MODULE ...` does.

    ar-jax train llamagen:mnist5k                  a published config, or `ar-jax train FILE.py` one's own
    ar-jax sample runs/mnist5k_llamagen
    ar-jax COMMAND --help
"""

import runpy
import sys

COMMANDS = {  # module, what it does
    "train": ("ar_jax.train", "trains the tokenizer and the generator of a config"),
    "watch": ("ar_jax.watch", "writes a run as one HTML page: curves, pictures, settings"),
    "sample": ("ar_jax.sample", "draws and edits images"),
    "demo": ("ar_jax.demo", "opens a page to draw on"),
    "evaluate": ("ar_jax.evaluate", "figures of samples and tokenizers, by the protocols of the field"),
    "tokenize": ("ar_jax.tokenize", "keeps the tokens of a data set in files, to train on"),
    "codebook": ("ar_jax.codebook", "clusters a teacher's features of your images into a frozen codebook"),
    "convert": ("ar_jax.convert", "released weights in, and back out"),
    "pack": ("ar_jax.data.pack", "a folder of images in few large files"),
    "bench": ("ar_jax.bench", "speed of a config beside what the machine can do"),
    "doctor": ("ar_jax.doctor", "what is missing or wrong on this machine, and what mends it"),
    "plan": ("ar_jax.plan", "what a config needs on a TPU pod that is not here"),
}


def main() -> None:
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__)
        for name, (_, purpose) in COMMANDS.items():
            print(f"    {name:<12}{purpose}")
        return
    if command not in COMMANDS:
        raise SystemExit(f"ar-jax: there is no command {command!r}; there are {', '.join(COMMANDS)}")
    sys.argv = [f"ar-jax {command}", *arguments]
    runpy.run_module(COMMANDS[command][0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
