"""A checkpoint in one file, in the layout of the program that Stable Diffusion was trained with."""

import os
from pathlib import Path
from typing import Any

from jaxmem.extras import require
from jaxmem.sources.opened import quiet_libraries
from jaxmem.stable_diffusion import adapters
from jaxmem.stable_diffusion.settings import Reading
from jaxmem.stable_diffusion.tensors import Tensor, read_file

# Where the networks are in such a file; beside them are EMA's copies, and the tables of a noise schedule.
_NETWORKS = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}
_LOSS, _AVERAGES = "first_stage_model.loss.", "model_ema."
_SCHEDULE = {"betas", "logvar", "lvlb_weights", "global_step", "scale_factor", "denoiser.sigmas"}
_OTHER = {
    "conditioner.embedders.": "Stable Diffusion XL",
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3",
    "model.diffusion_model.double_blocks.": "Flux",
}
_OPEN_CLIP = "cond_stage_model.model."  # of Stable Diffusion 2, whose file does not say what the network predicts


def is_checkpoint(path: Path) -> bool:
    """Whether a file is a whole model; pickles are not looked at."""
    return path.suffix.lower() == ".safetensors" and adapters.kind_of(path) == adapters.CHECKPOINT


def open_single_file(path: Path, reading: Reading) -> Any:
    """The pipeline that diffusers makes of a checkpoint, in float32.

    Its settings and its tokenizer are not in such a file: they are those of a diffusers folder beside it, which is
    called as the file is or has the file in it, or of the original model on the hub, whose small files are downloaded.

    Raises:
        ValueError: another architecture, tensors that would be left out, or settings of another model.
        OSError: there is no such folder, and the hub cannot be reached.
        MissingExtra: diffusers and torch are not installed.
    """
    require("diffusers", "a model in a single file")
    tensors = read_file(path)
    _check(path, tensors, reading)
    from diffusers import StableDiffusionPipeline

    config = next((one for one in (path.with_suffix(""), path.parent) if (one / "model_index.json").is_file()), None)
    try:
        with quiet_libraries():
            pipeline = StableDiffusionPipeline.from_single_file(
                os.fspath(path),
                config=None if config is None else os.fspath(config),
                safety_checker=None,
                feature_extractor=None,
            )
    except Exception as error:  # of the network and of shapes, in many libraries' types
        if config is None and isinstance(error, OSError | ImportError | RuntimeError):
            raise OSError(
                f"{path}: expected the settings and the tokenizer of its model, which are not in a single file, got"
                f" neither a diffusers folder beside it ({path.with_suffix('')}) nor an answer of the hub"
                f" ({type(error).__name__}: {error!s:.300}); put the JSON files and the folder tokenizer of such a"
                f" model there, or try again with a connection"
            ) from error
        raise ValueError(
            f"{path}: expected a checkpoint of the model whose settings are in"
            f" {config or 'the original repository on the hub'}, got one that diffusers does not load with them"
            f" ({type(error).__name__}: {error!s:.400})"
        ) from error
    for part in ("unet", "vae"):
        there = sum(tensor.size for tensor in tensors if _part(tensor.name) == part)
        used = sum(parameter.numel() for parameter in getattr(pipeline, part).parameters())
        if there != used:
            raise ValueError(
                f"{path}: expected {used:,} numbers of the {part}, as its settings have, got {there:,}: what does not"
                f" fit would be left out; give the settings of its model in {path.with_suffix('')}"
            )
    for part in _NETWORKS:
        getattr(pipeline, part).float()
    return pipeline


def _part(name: str) -> str | None:
    return next(
        (part for part, start in _NETWORKS.items() if name.startswith(start) and not name.startswith(_LOSS)), None
    )


def _check(path: Path, tensors: list[Tensor], reading: Reading) -> None:
    """Refuse what is no Stable Diffusion 1 or 2 alone; tell what the file leaves open."""
    names = [tensor.name for tensor in tensors]
    other = next((model for start, model in _OTHER.items() if any(name.startswith(start) for name in names)), None)
    if other is not None:
        raise ValueError(
            f"{path}: expected a single file of Stable Diffusion 1 or 2, got one of {other}; give its diffusers folder"
            f" or hub id"
        )
    missing = [part for part in _NETWORKS if not any(_part(name) == part for name in names)]
    if missing:
        raise ValueError(f"{path}: expected a whole Stable Diffusion, got a file without {', '.join(missing)}")
    adapters.refuse_unmerged(names, str(path))
    strange = [
        name
        for name in names
        if _part(name) is None
        and not name.startswith((_LOSS, _AVERAGES))
        and name not in _SCHEDULE
        and not name.startswith(("alphas_", "sqrt_", "log_", "posterior_"))
    ]
    if strange:
        reading.warnings.append(
            f"{path.name}: {len(strange)} tensors that no part of a Stable Diffusion has are not read"
            f" ({strange[0]}, ...)"
        )
    if any(name.startswith(_AVERAGES) for name in names):
        reading.notes.append(f"{path.name}: the weights are read, not their averages ({_AVERAGES}*)")
    if reading.prediction_type is None and any(name.startswith(_OPEN_CLIP) for name in names):
        reading.notes.append(
            f"{path.name}: a single file of Stable Diffusion 2 does not say what its network predicts; taken from the"
            f" settings of its model; give `prediction_type` where that is wrong"
        )
