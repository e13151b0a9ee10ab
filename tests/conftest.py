"""Eight simulated CPU devices and one compilation cache for all tests, but for `-m gpu`: those run on what is there."""

import os
import pathlib


def pytest_configure(config):
    if config.option.markexpr != "gpu":
        simulate_devices()


def simulate_devices():
    """In a process of a test's own, too; before JAX has counted its devices."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")
    # Many small programs, each run a few times: on two cores the compiler's effort is the test's time.
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=1"

    import jax

    cache = pathlib.Path(__file__).parent.parent / ".cache" / f"jax-{jax.__version__}"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
