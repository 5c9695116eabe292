"""Double precision, constant seeds, and what happens where a host is not installed.

``GRADEST_REQUIRE`` names the hosts that the tests may not do without: ``pyro``, ``numpyro`` or
``both`` (what ``make test`` sets). Where a host is missing and not named, its tests are left out.
"""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

ROOT = Path(__file__).parents[1]

# Host -> our package for it.
PACKAGES = {"pyro": "pyro_gradest", "numpyro": "numpyro_gradest"}

_REQUIREMENTS = {"": (), "pyro": ("pyro",), "numpyro": ("numpyro",), "both": tuple(PACKAGES)}
_REQUIRED = _REQUIREMENTS[os.environ.get("GRADEST_REQUIRE", "")]
_INSTALLED = {host: importlib.util.find_spec(host) is not None for host in PACKAGES}

# Shapes and types are checked at every call, under test only. An int will do for a float.
install_import_hook(
    list(PACKAGES.values()),
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

# Everything runs in float64; a test of float32 or of the user's defaults says so itself.
if _INSTALLED["pyro"]:
    import pyro
    import torch

    torch.set_default_dtype(torch.float64)

if _INSTALLED["numpyro"]:
    import jax

    jax.config.update("jax_enable_x64", True)


def require_host(host: str) -> None:
    """Skip the test where ``host`` is not installed; fail it where ``GRADEST_REQUIRE`` names it."""
    if _INSTALLED[host]:
        return
    if host in _REQUIRED:
        pytest.fail(f"{host} is required by GRADEST_REQUIRE but is not installed: run `make test`.")
    pytest.skip(f"{host} is not installed")


def source_modules(package: str) -> dict[str, Path]:
    """Every module of ``package`` by its dotted name, read from the source tree, not imported."""
    modules = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def _is_left_out(host: str) -> bool:
    return not _INSTALLED[host] and host not in _REQUIRED


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out the folder of a host that is neither installed nor required."""
    here = Path(__file__).parent
    left_out = [here / host for host in PACKAGES if _is_left_out(host)]
    return True if collection_path in left_out else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests come first: last, one worker would wait for the other's."""
    longest = ("test_tutorials.py", "test_quickstart.py")
    items.sort(key=lambda item: item.path.name not in longest)


def pytest_report_header() -> list[str]:
    """Say at the top of the run which host's tests are left out."""
    return [
        f"{host} is not installed: its tests are left out"
        for host in PACKAGES
        if _is_left_out(host)
    ]


def pytest_configure(config: pytest.Config) -> None:
    """Keep in pytest's cache what JAX compiles, which takes most of the suite's time.

    The other worker finds it there, and so does the next run. ``--cache-clear`` empties it.
    """
    if not (_INSTALLED["numpyro"] and config.pluginmanager.hasplugin("cacheprovider")):
        return
    settings = {
        "jax_compilation_cache_dir": str(config.cache.mkdir("jax")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)  # for the programs that tests start


@pytest.fixture(autouse=True)
def isolated_hosts() -> Iterator[None]:
    """Start every test from the same seed, an empty parameter store and the suite's settings."""
    if not _INSTALLED["pyro"]:
        yield
        return
    pyro.set_rng_seed(0)  # torch's, NumPy's and Python's generators
    pyro.clear_param_store()
    with pyro.settings.context(**pyro.settings.get()):
        yield
    torch.set_default_dtype(torch.float64)


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_dropped() -> Iterator[None]:
    """JAX keeps what it compiled: gigabytes by the end of the suite, and no other module's use."""
    yield
    if _INSTALLED["numpyro"]:
        jax.clear_caches()


@pytest.fixture
def strict_promotion() -> Iterator[None]:
    """Refuse JAX's implicit dtype promotion: layer 1 never mixes dtypes silently."""
    require_host("numpyro")
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def user_defaults() -> Iterator[None]:
    """The settings a user meets: float32 in both hosts."""
    if _INSTALLED["pyro"]:
        torch.set_default_dtype(torch.float32)
    if _INSTALLED["numpyro"]:
        with jax.enable_x64(False):
            yield
    else:
        yield
