"""Memorization in diffusion models, measured by the eigenvalues of the Hessian of log p_t(x | c).

The public names are imported on first use, so that ``import jaxmem`` and ``jaxmem --help`` do not load JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "Model": "jaxmem.model",
    "ClassConditional": "jaxmem.score_models",
    "Unconditional": "jaxmem.score_models",
    "StableDiffusion": "jaxmem.stable_diffusion.pipeline",
    "NoiseSchedule": "jaxmem.diffusion",
    "FlowSchedule": "jaxmem.diffusion",
    "DDIM": "jaxmem.samplers",
    "FlowEuler": "jaxmem.samplers",
    "load": "jaxmem.sources.load",
    "sample": "jaxmem.sampling",
    "bind": "jaxmem.score",
    "ScorePair": "jaxmem.score",
    "from_torch": "jaxmem.bridge.score",
    "TorchOperator": "jaxmem.bridge.operator",
    "score_jacobian": "jaxmem.jacobian",
    "condition_jacobian": "jaxmem.condition",
    "Operator": "jaxmem.operators",
    "from_matvec": "jaxmem.function_operators",
    "from_scipy": "jaxmem.function_operators",
    "spectrum": "jaxmem.spectra",
    "Dense": "jaxmem.spectra",
    "Lanczos": "jaxmem.spectra",
    "Arnoldi": "jaxmem.spectra",
    "Extreme": "jaxmem.spectra",
    "batch_spectra": "jaxmem.spectra",
    "count_positive": "jaxmem.spectra",
    "spectral_density": "jaxmem.spectra",
    "trace": "jaxmem.spectra",
    "diagonal": "jaxmem.spectra",
    "singular_values": "jaxmem.spectra",
    "Spectrum": "jaxmem.spectra",
    "Status": "jaxmem.spectra",
    "Count": "jaxmem.spectra",
    "Density": "jaxmem.spectra",
    "Trace": "jaxmem.spectra",
    "Diagonal": "jaxmem.spectra",
    "SingularValues": "jaxmem.spectra",
    "audit_cost": "jaxmem.audit",
    "read_audit": "jaxmem.audit",
    "compare": "jaxmem.comparison",
    "read_prompts": "jaxmem.prompts",
    "AuditConfig": "jaxmem.config",
    "TrainingData": "jaxmem.audit.training.given",
    "read_training_images": "jaxmem.training_images",
}

# `jaxmem.audit` is a function, too.
_MODULES = ("attribution", "audit", "detectors", "dimension", "manifolds", "oracles", "plot")

__all__ = [
    "DDIM",
    "Arnoldi",
    "AuditConfig",
    "ClassConditional",
    "Count",
    "Dense",
    "Density",
    "Diagonal",
    "Extreme",
    "FlowEuler",
    "FlowSchedule",
    "Lanczos",
    "Model",
    "NoiseSchedule",
    "Operator",
    "ScorePair",
    "SingularValues",
    "Spectrum",
    "StableDiffusion",
    "Status",
    "TorchOperator",
    "Trace",
    "TrainingData",
    "Unconditional",
    "__version__",
    "attribution",
    "audit",
    "audit_cost",
    "batch_spectra",
    "bind",
    "compare",
    "condition_jacobian",
    "count_positive",
    "detectors",
    "diagonal",
    "dimension",
    "from_matvec",
    "from_scipy",
    "from_torch",
    "load",
    "manifolds",
    "oracles",
    "plot",
    "read_audit",
    "read_prompts",
    "read_training_images",
    "sample",
    "score_jacobian",
    "singular_values",
    "spectral_density",
    "spectrum",
    "trace",
]

if TYPE_CHECKING:
    from jaxmem import attribution, detectors, dimension, manifolds, oracles, plot
    from jaxmem.audit import audit, audit_cost, read_audit
    from jaxmem.audit.training.given import TrainingData
    from jaxmem.bridge.operator import TorchOperator
    from jaxmem.bridge.score import from_torch
    from jaxmem.comparison import compare
    from jaxmem.condition import condition_jacobian
    from jaxmem.config import AuditConfig
    from jaxmem.diffusion import FlowSchedule, NoiseSchedule
    from jaxmem.function_operators import from_matvec, from_scipy
    from jaxmem.jacobian import score_jacobian
    from jaxmem.model import Model
    from jaxmem.operators import Operator
    from jaxmem.prompts import read_prompts
    from jaxmem.samplers import DDIM, FlowEuler
    from jaxmem.sampling import sample
    from jaxmem.score import ScorePair, bind
    from jaxmem.score_models import ClassConditional, Unconditional
    from jaxmem.sources.load import load
    from jaxmem.spectra import (
        Arnoldi,
        Count,
        Dense,
        Density,
        Diagonal,
        Extreme,
        Lanczos,
        SingularValues,
        Spectrum,
        Status,
        Trace,
        batch_spectra,
        count_positive,
        diagonal,
        singular_values,
        spectral_density,
        spectrum,
        trace,
    )
    from jaxmem.stable_diffusion.pipeline import StableDiffusion
    from jaxmem.training_images import read_training_images


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"jaxmem.{name}")
    if name == "__version__":  # pyproject.toml has it
        return import_module("importlib.metadata").version("jaxmem")
    if name not in _HOME:
        known = ", ".join(sorted((*_HOME, *_MODULES)))
        raise AttributeError(f"module 'jaxmem' has no attribute {name!r}; it has {known}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
