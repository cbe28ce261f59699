"""Eight virtual CPU devices for the sharding tests, and a folder of compiled programs; set before JAX starts."""

import atexit
import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # or every script would start twice for it
os.environ["XLA_FLAGS"] = " ".join((
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_cpu_use_fusion_emitters=false",  # the older emitters compile the same programs in less than half the time
))  # fmt: skip
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="ar_jax-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import pytest

jax.config.update("jax_enable_compilation_cache", False)  # programs are kept for commands that tests start only


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Every compiled program holds memory maps, of which a process may have 65,530: XLA crashes when they run out."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def quick_compile():
    """Halves the time of a file that compiles much and computes little."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
