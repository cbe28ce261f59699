"""What importing costs and what it leaves alone; each case in a fresh interpreter."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMANDS = ("ar_jax.data", "ar_jax.convert.sources", "ar_jax.files.weights", "ar_jax.evaluate", "train", "sample")
HEAVY = ("torch", "tensorflow", "tensorflow_datasets", "sklearn", "matplotlib")


def python(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_the_package_takes_no_time_and_no_jax():
    code = (
        "import sys, time; before = set(sys.modules); start = time.process_time(); import ar_jax; "
        "print(time.process_time() - start, ar_jax.__version__, *sorted(set(sys.modules) - before))"
    )
    seconds, version, *modules = python(code)
    assert modules == ["ar_jax"]
    assert float(seconds) < 0.3
    assert version.count(".") == 2


def test_no_command_imports_torch_or_tensorflow():
    code = f"import sys, {', '.join(COMMANDS)}; print('loaded', *(m for m in {HEAVY} if m in sys.modules))"
    assert python(code) == ["loaded"]


def test_the_log_of_a_training_does_not_import_torch(tmp_path):
    code = (
        "import sys, pathlib; from ar_jax.train.log import Log; "
        f"log = Log(pathlib.Path({str(tmp_path)!r}), 'x', 0, 1); log.metrics(1, {{'loss': 2.0}}); log.close(); "
        f"print('logged', *(m for m in {HEAVY} if m in sys.modules))"
    )
    assert python(code) == ["logged"]
    assert list(tmp_path.glob("events*")), "TensorBoard's file is written"
