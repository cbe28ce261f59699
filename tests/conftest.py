"""What JAX reads before it starts: eight virtual CPU devices for the sharding tests, and programs compiled in a hurry.

Compiling is what the tests spend their time on. They are compiled without most optimisations, by XLA's older emitters
(half the time of the newer ones), and kept in a folder that the workers of a run and the commands they start share.
Name a folder in JAX_COMPILATION_CACHE_DIR to keep them from one run to the next.
"""

import atexit
import gc
import os
import pathlib
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
os.environ["XLA_FLAGS"] = " ".join((
    os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8",
    "--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1",
))  # fmt: skip
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # or every script would start twice for it
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="ar_jax-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
if "AR_JAX_CACHE" not in os.environ:
    os.environ["AR_JAX_CACHE"] = tempfile.mkdtemp(prefix="ar_jax-cache-")
    atexit.register(shutil.rmtree, os.environ["AR_JAX_CACHE"], ignore_errors=True)

import jax
import pytest

gc.freeze()  # tracing makes many objects that live on: looking through them all at each turn takes a twentieth of the time
gc.set_threshold(20_000, 20, 100)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Every compiled program holds memory maps, of which a process may have 65,530: XLA crashes when they run out."""
    yield
    if pathlib.Path("/proc/self/maps").read_text().count("\n") > 20_000:
        jax.clear_caches()
