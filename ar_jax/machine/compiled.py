"""Compiled programs, kept on disk: the same command starts quickly the second time."""

import jax

from ar_jax.files.cache import place


def keep_compiled() -> None:
    """Keeps compiled programs in the cache (see `files.cache`), unless JAX_COMPILATION_CACHE_DIR (or JAX's setting) names a folder."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(place("compiled")))
