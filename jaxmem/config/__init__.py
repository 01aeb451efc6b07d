"""Every configuration: frozen dataclasses of plain values, importable without JAX.

Each class is one flag group of the command line; a run's manifest holds exactly these values.
"""

from jaxmem.config.dimension import DimensionConfig
from jaxmem.config.experiments import (
    MNIST_PRESETS,
    SD_PRESETS,
    TOY2D_PRESETS,
    MnistConfig,
    Toy2dConfig,
    VerbatimConfig,
)
from jaxmem.config.finetune import FINETUNE_PRESETS, FinetuneConfig
from jaxmem.config.models import AuditConfig, FilesConfig, GenerateConfig, PartsConfig, SpectrumConfig
from jaxmem.config.training import AutoencoderConfig, TrainingConfig

__all__ = [
    "FINETUNE_PRESETS",
    "MNIST_PRESETS",
    "SD_PRESETS",
    "TOY2D_PRESETS",
    "AuditConfig",
    "AutoencoderConfig",
    "DimensionConfig",
    "FilesConfig",
    "FinetuneConfig",
    "GenerateConfig",
    "MnistConfig",
    "PartsConfig",
    "SpectrumConfig",
    "Toy2dConfig",
    "TrainingConfig",
    "VerbatimConfig",
]
