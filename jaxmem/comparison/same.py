"""May they be compared? Audits of the same training images, looked at in the same way."""

from collections.abc import Sequence
from typing import Any

from jaxmem.audit.whole import read_whole
from jaxmem.runs.directory import Run
from jaxmem.runs.identity import differences

# What may differ: the weights, how the work was cut up, what is shown.
_FREE_CONFIG = ("batch", "directions")
_FREE_PLAN = ("batch", "directions")
_MODEL = ("parameters", "clip_skip", "prediction_type", "ignored_settings", "latent_shape", "prediction", "shape")


def refuse_others(runs: Sequence[Run]) -> None:
    """Raise a ValueError that names each run which is no audit with training images, or not comparable to the first."""
    for run in runs:
        if run.manifest.get("experiment") != "audit" or not run.manifest.get("training"):
            raise ValueError(
                f"{run.directory}: expected the run of an audit with training images, got one without; audit this"
                f" checkpoint with the images that it was trained on"
            )
    first, *others = runs
    images = [str(run.directory) for run in others if _images(run) != _images(first)]
    if images:
        raise ValueError(
            f"runs: expected audits with the same training images and captions in the same order, as in"
            f" {first.directory}, got others in {', '.join(images)}"
        )
    wanted = _settings(first)  # with the extensions, as results are read
    if different := [f"{run.directory} ({found})" for run in others if (found := differences(wanted, _settings(run)))]:
        raise ValueError(
            f"runs: expected audits with the same settings as {first.directory} (there), got others in"
            f" {', '.join(different)}; audit the checkpoints alike"
        )


def _images(run: Run) -> Any:
    return run.manifest["training"].get("images_sha256")


def _settings(run: Run) -> dict[str, Any]:
    """Of a run what must be the same, as JSON values."""
    manifest = read_whole(run).manifest

    def without(section: str, names: Sequence[str]) -> dict[str, Any]:
        return {name: value for name, value in (manifest.get(section) or {}).items() if name not in names}

    model = manifest.get("model") or {}
    return {
        "config": without("config", _FREE_CONFIG),
        "plan": without("plan", _FREE_PLAN),
        "training": without("training", ("show", "images_sha256", "captions_sha256")),
        "model": {name: model[name] for name in _MODEL if name in model},
        "sampler": manifest.get("sampler"),
        "detectors": manifest.get("detectors"),
        "dtype": manifest.get("dtype"),
    }
