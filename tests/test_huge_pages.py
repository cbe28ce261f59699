import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, sys
print("begin", flush=True)
from ar_jax.machine.huge_pages import use_huge_pages
use_huge_pages()
print(os.environ["GLIBC_TUNABLES"], sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's setting")
@pytest.mark.parametrize(
    ("before", "after", "starts"),
    [
        ("", "glibc.malloc.hugetlb=1", 2),
        ("glibc.malloc.check=0", "glibc.malloc.check=0:glibc.malloc.hugetlb=1", 2),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0", 1),
    ],
)
def test_a_script_starts_anew_with_its_arguments_unless_the_setting_is_there(tmp_path, before, after, starts):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"GLIBC_TUNABLES": before, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, str(tmp_path / "script.py"), "a b", "--c"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:-1] == ["begin"] * starts + [f"{after} ['a b', '--c']"]
