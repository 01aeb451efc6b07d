"""The manifest of a run: what decides its results, written first and compared at every later start."""

import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jaxmem.runs.durable import TEMPORARY, as_json, clear_os_errors, json_writer, write_once
from jaxmem.runs.identity import differences

FORMAT = 2  #: of a run's folder; 1 (jaxmem 0.1) had one array per ``.npy`` file, and checkpoints of orbax
RECORDED = ("versions", "device", "origin")  #: sections that a continued run may differ in
PACKAGES = ("jaxmem", "jax", "jaxlib", "flax", "optax", "numpy")


def is_run(source: Any) -> bool:
    """Whether a source of a model is the folder of a run, not of a diffusers model."""
    return isinstance(source, str | Path) and (Path(source) / "manifest.json").is_file()


def describe(config: dict[str, Any], provenance: dict[str, Any]) -> dict[str, Any]:
    """What must be the same to continue a run, as JSON values.

    Raises:
        ValueError: a value is none of JSON's, or names a file of this machine: moved data is the same data.
    """
    description = as_json({"format": FORMAT, "config": config, **provenance}, "manifest")
    for name, value in _flat(description):
        # A prompt may say "/imagine"; it is no path, whatever it begins with.
        if isinstance(value, str) and os.path.isabs(value) and not name.endswith("prompt"):
            raise ValueError(f"{name}: expected no absolute path in a manifest, got {value}; record a hash of the data")
    return description


def environment() -> dict[str, Any]:
    """Versions and device, which a manifest records and a continued run may change."""
    import jax

    devices = jax.devices()
    versions = {name: version(name) for name in PACKAGES}
    versions["python"] = ".".join(map(str, sys.version_info[:3]))
    return {"versions": versions, "device": {"kind": devices[0].device_kind, "count": len(devices)}}


def create(path: Path, manifest: dict[str, Any], process: int) -> bool:
    """Write the manifest into a new or empty directory; False if another process was first.

    Raises:
        ValueError: the directory holds other files.
        OSError: the directory cannot be written.
    """
    directory = path.parent
    names = sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []
    foreign = [name for name in names if not name.startswith(TEMPORARY)]
    # A manifest comes before all else of a run: where it is by now, what is there is its run's.
    if foreign and not path.exists():
        raise ValueError(
            f"{directory}: expected a new or empty directory or a run, got {len(foreign)} other entries "
            f"({', '.join(foreign[:3])}{', …' if len(foreign) > 3 else ''}); choose another folder"
        )
    with clear_os_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    return write_once(path, json_writer(manifest), process)


def refuse_other_format(directory: Path, manifest: dict[str, Any]) -> None:
    """Raise a ValueError for a run of another version of jaxmem, whose files are others."""
    if manifest.get("format") != FORMAT:
        made = (manifest.get("versions") or {}).get("jaxmem", "unknown")
        raise ValueError(
            f"{directory}: expected a run of format {FORMAT}, got format {manifest.get('format')} of jaxmem {made};"
            f" read it with that version, or run the experiment again in a new folder"
        )


def refuse_other_work(directory: Path, manifest: dict[str, Any], description: dict[str, Any]) -> None:
    """Raise a ValueError, which names the fields that differ, for a run that is not the one described."""
    there = {name: value for name, value in manifest.items() if name not in RECORDED}
    if differing := differences(there, description):
        raise ValueError(
            f"{directory}: expected a run of the same config, got another one ({differing}); give the same values to "
            "continue it (where one has a field that the other lacks, with the version of jaxmem that made it), "
            "or choose another folder"
        )


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value
