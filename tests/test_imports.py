"""What `import zerojax` brings, and what it leaves for later."""

import subprocess
import sys

import pytest

import zerojax

LATER = ["flax", "ml_collections", "orbax"]


def test_heavy_packages_wait_until_they_are_used():
    code = f"import sys, zerojax; print([name for name in {LATER} if name in sys.modules], zerojax.initialize.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[0] == "[] initialize", done.stderr


def test_names_that_are_imported_later():
    from zerojax import config
    from zerojax.engine import initialize

    assert zerojax.config is config and zerojax.initialize is initialize
    assert zerojax.Dataloader.__module__ == "zerojax.data"
    with pytest.raises(AttributeError, match="no attribute 'initialise'"):
        _ = zerojax.initialise
