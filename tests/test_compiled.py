import jax
import pytest

from ar_jax.machine.compiled import keep_compiled


@pytest.fixture
def setting():
    before = jax.config.jax_compilation_cache_dir
    yield lambda folder: jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_are_kept_in_the_home_folder_unless_another_is_named(setting, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("AR_JAX_CACHE", raising=False)
    setting("elsewhere")
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir == "elsewhere"
    setting(None)
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / ".cache" / "ar_jax" / "compiled")
    monkeypatch.setenv("AR_JAX_CACHE", str(tmp_path / "shared"))
    setting(None)
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "shared" / "compiled")
