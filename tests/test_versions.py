"""What holds for every version of the packages below jaxmem, and where some of them are not installed."""

import ast
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import command_environment

from jaxmem.extras import EXTRAS, MissingExtra, require

ROOT = Path(__file__).parent.parent
BELOW = ("jax", "flax", "numpy", "scipy", "optax")


def _names_from_below(path: Path):
    """Every dotted name of another package that a file uses: imports, and attributes of what they bind."""
    tree = ast.parse(path.read_text())
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound, _, _ = alias.name.partition(".")
                modules[alias.asname or bound] = alias.name if alias.asname else bound
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        attributes = []
        while isinstance(node, ast.Attribute):
            attributes.append(node.attr)
            node = node.value
        if attributes and isinstance(node, ast.Name) and node.id in modules:
            yield ".".join([modules[node.id], *reversed(attributes)])


def _resolve(name: str) -> None:
    """Find a dotted name as far as it goes through modules; what their objects have is not its matter."""
    first, *rest = name.split(".")
    found, path = import_module(first), first
    for part in rest:
        if not isinstance(found, ModuleType):
            return
        path = f"{path}.{part}"
        found = getattr(found, part) if hasattr(found, part) else import_module(path)


def test_names_of_other_packages_are_public_and_there():
    used = {name: path for path in sorted(ROOT.glob("jaxmem/**/*.py")) for name in _names_from_below(path)}
    used = {name: path for name, path in used.items() if name.split(".")[0] in BELOW}
    assert len(used) > 200
    assert [(name, str(path)) for name, path in used.items() if "._" in name] == []
    for name in used:
        _resolve(name)  # a name that is deprecated warns, which is an error here


@pytest.mark.parametrize("name", ["jax.interpreters.batching.no_such_name", "jax._src.no_such_module"])
def test_a_vanished_name_is_found(name):
    with pytest.raises(ModuleNotFoundError):
        _resolve(name)


def test_sums_of_vmapped_products_have_all_their_terms():
    # jax issue 39103: jaxlib 0.10.2 gave 1071645696 for the last one.
    rows = jnp.zeros((32_769, 3)).at[:, 0].set(jnp.arange(32_769))
    sums = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))(rows)
    np.testing.assert_allclose(sums, np.arange(32_769.0) ** 2, rtol=1e-6)  # three terms in float32


def test_the_extras_are_those_of_pyproject():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    of_import = packages_distributions()

    def spelt(name):
        return name.lower().replace("_", "-")  # a wheel may be spelt either way

    for extra, imports in EXTRAS.items():
        names = {spelt(requirement.partition(">=")[0]) for requirement in declared[extra]} - {"jaxmem[audit]"}
        assert {spelt(of_import.get(name, [name])[0]) for name in imports} == names


def test_a_missing_package_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)
    expected = r"the page: expected the packages of jaxmem\[audit\], .* without tyro; .* pip install 'jaxmem\[audit\]'"
    with pytest.raises(MissingExtra, match=expected):
        require("audit", "the page")


def _without_extras(program: str) -> subprocess.CompletedProcess:
    # Not torch: SciPy takes what is among the loaded modules under its name for it.
    missing = [name for names in EXTRAS.values() for name in names if name != "torch"]
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.modules.update(dict.fromkeys({missing})); {program}"],
        env=command_environment(),
        capture_output=True,
        text=True,
    )


def test_every_module_loads_with_the_core_or_names_its_extra():
    program = """
import importlib, pkgutil, jaxmem
from jaxmem.extras import MissingExtra
for module in pkgutil.walk_packages(jaxmem.__path__, "jaxmem.", onerror=lambda name: None):
    if module.name == "jaxmem.cli":  # behind jaxmem.__main__
        continue
    try:
        importlib.import_module(module.name)
    except MissingExtra:
        print("without", module.name)
    else:
        print("with", module.name)
"""
    done = _without_extras(f"exec({program!r})")
    assert done.returncode == 0, done.stderr
    found = dict(reversed(line.split()) for line in done.stdout.splitlines())
    core = "spectra score oracles krylov operators jacobian diffusion networks.unet training detectors runs"
    for name in core.split():
        assert found[f"jaxmem.{name}"] == "with"
    assert found["jaxmem.spectra.shared"] == "with"  # many machines
    for name in ("plot", "report", "stable_diffusion", "sources", "commands"):
        assert found[f"jaxmem.{name}"] == "without"


def test_the_command_line_says_what_it_misses():
    done = _without_extras("from jaxmem.__main__ import main; sys.exit(main())")
    assert done.returncode == 2
    assert not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("jaxmem: the command line: expected the packages of jaxmem[audit]")
    assert "tyro" in line
    assert line.endswith("install them: pip install 'jaxmem[audit]'")
