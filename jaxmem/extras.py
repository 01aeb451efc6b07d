"""Optional packages: an extra that is not installed whole is an error that names the command which installs it."""

from importlib.util import find_spec

# The packages of the extras of pyproject.toml, as they are imported.
EXTRAS = {
    "audit": (
        "huggingface_hub",
        "jinja2",
        "markupsafe",
        "matplotlib",
        "PIL",
        "pooch",
        "safetensors",
        "sklearn",
        "transformers",
        "tyro",
    ),
    "all": ("pandas", "pyarrow"),  # beside those of "audit"
    "descriptor": ("onnxruntime",),
    "torch": ("torch", "torchax"),
    "diffusers": ("accelerate", "diffusers", "peft", "torch", "torchax"),  # beside those of "audit"
}


class MissingExtra(ImportError):
    """A part of jaxmem needs packages that are not installed."""


def require(extra: str, what: str) -> None:
    """Raise an error that names ``what`` needs them, if packages of an extra are not installed; imports nothing.

    Raises:
        MissingExtra: a package is not installed.
    """
    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if missing:
        raise MissingExtra(
            f"{what}: expected the packages of jaxmem[{extra}], got an environment without {', '.join(missing)};"
            f" install them: pip install 'jaxmem[{extra}]'"
        )


def require_package(package: str, what: str) -> None:
    """Raise an error that names ``what`` needs it, if one package that no part but this needs is not installed.

    Raises:
        MissingExtra: the package is not installed.
    """
    if find_spec(package) is None:
        raise MissingExtra(
            f"{what}: expected {package}, got an environment without it; install it: pip install {package}"
        )
