"""Test set-up: eight CPU devices, exact matmuls, quick compiling; what cannot run here is left out."""

import importlib.util
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    # Tests compile much and run little: half the time without LLVM's passes.
    + " --xla_backend_optimization_level=0"
).strip()
# The cache of compiled programs would make a test depend on the runs before it.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import jax

jax.config.update("jax_default_matmul_precision", "highest")


def pytest_collection_modifyitems(config, items):
    """Takes out tests that need recordings or a package where there is none."""
    absent = []
    if not os.path.isdir(os.environ.get("ARGENSEG_GOLDEN", "")):
        absent.append("golden_full")
    absent += [
        marker
        for marker, module in (("torch", "torch"), ("beam", "apache_beam"), ("libtpu", "libtpu"))
        if importlib.util.find_spec(module) is None
    ]
    out = [item for item in items if any(item.get_closest_marker(name) for name in absent)]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]
