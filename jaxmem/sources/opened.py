"""Pipelines of diffusers that nobody else has: opened here or copied from a user's, so that they may be changed."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from jaxmem.extras import require
from jaxmem.runs import memory
from jaxmem.runs.durable import read_json
from jaxmem.runs.progress import Say
from jaxmem.sources.needs import needs
from jaxmem.stable_diffusion import weights
from jaxmem.stable_diffusion.folder import find_unet, read_folder
from jaxmem.stable_diffusion.hub import hub_id
from jaxmem.stable_diffusion.settings import Reading
from jaxmem.stable_diffusion.tensors import files_read

_COPIED = ("unet", "text_encoder", "tokenizer")  # what LoRA and textual inversions change
_WITHOUT: dict[str, Any] = dict(safety_checker=None, feature_extractor=None, image_encoder=None)


def open_folder(folder: Path, class_name: str, reading: Reading) -> Any:
    """The pipeline of a Stable Diffusion folder, in float32, after jaxmem's own look at its files.

    Raises:
        ValueError: as `read_folder`.
        MissingExtra: diffusers and torch are not installed.
    """
    require("diffusers", "a model with LoRA or embeddings")
    parts = read_folder(folder, reading)
    needed = sum(component.float32_bytes for component in parts.components.values())
    memory.require(2 * needed, "the model in diffusers and in JAX", "close other programs, or use a larger machine")
    import diffusers
    from transformers import CLIPTextModel

    unet = folder / "unet" if reading.unet is None else find_unet(reading.unet, reading)
    with quiet_libraries():
        networks = {
            "unet": _network(diffusers.UNet2DConditionModel, unet, weights.UNET),
            "vae": _network(diffusers.AutoencoderKL, folder / "vae", weights.VAE),
            "text_encoder": _network(CLIPTextModel, folder / "text_encoder", weights.TEXT_ENCODER),
        }
        return getattr(diffusers, class_name).from_pretrained(
            os.fspath(folder), **networks, **_WITHOUT, requires_safety_checker=False, local_files_only=True
        )


def open_any(source: str | Path, reading: Reading, say: Say) -> Any:
    """The pipeline of a folder or a hub id, of whatever class it says; first what it needs is said.

    Raises:
        ValueError: it does not fit into memory; only the heads of its files were read.
        MissingExtra: diffusers and torch are not installed.
    """
    require("diffusers", "a pipeline of diffusers")
    import diffusers

    on_hub = None if Path(source).is_dir() else hub_id(source)
    loader = diffusers.DiffusionPipeline
    with quiet_libraries():
        folder = (
            loader.download(on_hub.name, revision=on_hub.revision, use_safetensors=True) if on_hub else Path(source)
        )
        needed = needs(Path(folder))
        say(needed.line(reading.parameters))
        needed.require(reading.parameters)
        return loader.from_pretrained(os.fspath(folder), use_safetensors=True, local_files_only=True)


def _network(cls: Any, folder: Path, layout: weights.Layout) -> Any:
    """A network of the files that jaxmem would read; those in half precision where there are no others."""
    half = any(".fp16" in path.name for path in files_read(folder, layout.basename))
    found = cls.from_pretrained(os.fspath(folder), variant="fp16" if half else None, use_safetensors=True)
    return found.float().eval()


def replace_unet(pipeline: Any, reading: Reading) -> None:
    """Put the UNet that was asked for in place of the pipeline's."""
    if reading.unet is None:
        return
    import diffusers

    with quiet_libraries():
        folder = find_unet(reading.unet, reading)
        pipeline.unet = _network(diffusers.UNet2DConditionModel, folder, weights.UNET)


def replace_network(pipeline: Any, reading: Reading) -> None:
    """The same for a pipeline of another class, whose network may be a transformer.

    Raises:
        ValueError: there is no such network, or it is of another class.
    """
    if reading.unet is None:
        return
    part = "unet" if "unet" in pipeline.components else "transformer"
    own, path = getattr(pipeline, part), Path(os.path.expanduser(reading.unet))
    folder = next((one for one in (path, path / part) if (one / "config.json").is_file()), None)
    found = None if folder is None else read_json(folder / "config.json", "save it again").get("_class_name")
    if folder is None or found != type(own).__name__:
        got = f"{path}, which has none" if folder is None else f"{folder} of {found}"
        raise ValueError(
            f"another `unet`: expected a folder of a {type(own).__name__}, as diffusers saves it, got {got}"
        )
    with quiet_libraries():
        changed = type(own).from_pretrained(os.fspath(folder), use_safetensors=True).float().eval()
    setattr(pipeline, part, changed)
    reading.chosen["unet_weights"] = "/".join(folder.resolve().parts[-2:])


def copy_of(pipeline: Any) -> Any:
    """A pipeline with networks and tokenizer of its own, in float32: what is done to it does not reach the user's."""
    parts = {name: deepcopy(part) if name in _COPIED else part for name, part in pipeline.components.items()}
    with quiet_libraries():
        made = type(pipeline)(
            **parts | {name: None for name in _WITHOUT if name in parts}, requires_safety_checker=False
        )
    made.unet.float()
    made.text_encoder.float()
    return made


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without the progress bars, log lines and warnings of diffusers and transformers, whose errors stay."""
    import diffusers
    import transformers

    kept = []
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        bars = logging.is_progress_bar_enabled()
        kept.append((logging, logging.get_verbosity(), bars))
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logging, verbosity, bars in kept:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
