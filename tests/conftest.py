"""Strict JAX, a compilation cache, and what tests share."""

import importlib
import json
import os
import sys
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from parity import Parity, Row, table

# Each user has one: another's may not be written to.
USER = os.getuid() if hasattr(os, "getuid") else "user"
CACHE = Path(os.environ.get("JAXMEM_TEST_CACHE", Path(tempfile.gettempdir()) / f"jaxmem-test-cache-{USER}"))
# Doctests are collected from every file here, and this one is a network of torch's.
collect_ignore = [] if find_spec("torch") else ["torch_unet.py"]

jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Parameters are arguments: an array of 256 kB closed over by a compiled function is a mistake (schedules are 8 kB).
jax.config.update("jax_captured_constants_warn_bytes", 256_000)


def command_environment(cache: Path = CACHE) -> dict[str, str]:
    """For command lines: this package, compiled programs kept apart from the user's, JAX's log level unset again."""
    inherited = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    return inherited | {"PYTHONPATH": str(Path(__file__).parent.parent), "COLUMNS": "120", "XDG_CACHE_HOME": str(cache)}


def with_xla_flags(environment: dict[str, str], flags: str) -> dict[str, str]:
    """The environment with more flags for XLA, beside those that `make test` sets."""
    return environment | {"XLA_FLAGS": f"{environment.get('XLA_FLAGS', '')} {flags}"}


def interruptible(arguments: list[str]) -> list[str]:
    """A command line that listens to interrupts, also where the tests run in the background with interrupts off."""
    script = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        " runpy.run_module('jaxmem', run_name='__main__')"
    )
    return [sys.executable, "-c", script, *arguments]


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
    """A process that keeps the programs of a thousand tests runs out of memory maps, and XLA then crashes."""
    yield
    jax.clear_caches()


@pytest.fixture
def getkey():
    """Fresh keys in a fixed order, so that no test names a seed."""
    counter = iter(range(1_000_000))
    return lambda: jax.random.fold_in(jax.random.key(20241124), next(counter))


@pytest.fixture
def unchecked():
    """Calls as users make them: without the type checks of the tests, before which our own errors would never come."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def float16():
    """Half precision, which jaxlib 0.10 has not with ``--xla_cpu_max_isa=SSE4_2``: conversions do not link there."""
    try:
        jax.block_until_ready(jax.jit(lambda x: x.astype(jnp.float16) + 1)(jnp.ones(2)))
    except jax.errors.JaxRuntimeError:
        pytest.skip("XLA's CPU compiler has no float16 arithmetic for this instruction set")


@pytest.fixture
def x64():
    """Double precision for the duration of one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def parity(record_property):
    """Compares with float64; see `parity.py`. ``--parity FILE`` runs these tests alone and writes the errors."""
    return Parity(lambda row: record_property("parity", list(row)))  # plain: it goes from process to process


def pytest_addoption(parser):
    parser.addoption(
        "--parity", metavar="FILE", help="only compare with float64, write the errors as JSON and print them"
    )


def pytest_collection_modifyitems(config, items):
    if config.getoption("parity"):
        config.hook.pytest_deselected(items=[item for item in items if "parity" not in item.fixturenames])
        items[:] = [item for item in items if "parity" in item.fixturenames]


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("parity"):
        return
    reports = [report for group in terminalreporter.stats.values() for report in group]
    calls = [report for report in reports if getattr(report, "when", None) == "call"]
    rows = [Row(*value) for report in calls for name, value in report.user_properties if name == "parity"]
    Path(config.getoption("parity")).write_text(json.dumps(rows, indent=0) + "\n")
    terminalreporter.section("relative errors against float64, the largest of each kind")
    terminalreporter.write("\n".join(table({"ours": rows})) + "\n")


def optional_import(name: str):
    """Import a peer, or skip with the reason; its own import warnings are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError:
            pytest.skip(f"{name} is not installed: it comes with jaxmem[test,parity] (CONTRIBUTING)")


@pytest.fixture(scope="session")
def torch():
    """The parity oracle, or a skip."""
    return optional_import("torch")


@pytest.fixture(scope="session")
def diffusers():
    """The schedulers and pipelines we compare with, or a skip; without torch diffusers has stand-ins that raise."""
    optional_import("torch")
    return optional_import("diffusers")
