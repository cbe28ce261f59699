"""Autoregressive visual generation in JAX.

    import ar_jax

    model = ar_jax.load("runs/mnist5k_llamagen")
    images = model.sample(labels=[3, 7], guidance=3.0, seed=0)
"""

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> object:
    if name == "load":  # only now, for `import ar_jax` is to stay quick
        from ar_jax.loaded import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
