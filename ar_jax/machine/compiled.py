"""Compiled programs, kept on disk: the same command starts quickly the second time."""

from pathlib import Path

import jax


def keep_compiled() -> None:
    """Keeps compiled programs in ~/.cache/ar_jax, unless JAX_COMPILATION_CACHE_DIR (or JAX's setting) names a folder."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "ar_jax" / "compiled"))
