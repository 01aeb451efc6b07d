"""A diffusers folder, read into the parts of a model or written from them."""

import os
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from jaxmem.runs.durable import json_writer, read_json, write_atomically
from jaxmem.stable_diffusion import adapters, weights
from jaxmem.stable_diffusion.components import Configs, Parts, check_class, read_parts
from jaxmem.stable_diffusion.configs.scheduler import OTHER_SCHEDULER, SCHEDULERS
from jaxmem.stable_diffusion.hub import find_model, model_file, read_tokenizer
from jaxmem.stable_diffusion.settings import Reading
from jaxmem.stable_diffusion.tensors import Tensor, files_read, read_tensors

_MODEL_INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
}
_ADD_IT = "add the {} of the model that it was made from, all five parts are needed"
_ALSO_READ = {"tokenizer": ("CLIPTokenizerFast",), "scheduler": tuple(SCHEDULERS)}


def read_folder(source: str | Path, reading: Reading) -> Parts:
    """The parts of a model in a folder or on the hub.

    Raises:
        ValueError: as `StableDiffusion.load`.
        OSError: the hub cannot be reached.
    """
    folder = find_model(source, reading.notes, with_unet=reading.unet is None)
    unet = folder / "unet" if reading.unet is None else find_unet(reading.unet, reading)
    layouts = {"unet": weights.UNET, "text_encoder": weights.TEXT_ENCODER, "vae": weights.VAE}
    read = {file for part, layout in layouts.items() for file in files_read(folder / part, layout.basename)}
    tokens = lambda: read_tokenizer(folder / "tokenizer").added_tokens_encoder  # noqa: E731
    adapters.refuse_beside(folder, read, tokens, reading.given)
    index = read_json(model_file(folder, "model_index.json"), "download it again")
    check_class(
        index.get("_class_name"),
        str(folder),
        "StableDiffusionPipeline.from_pretrained(folder).save_pretrained(other)",
    )
    _check_index(folder, index)
    if reading.unet is None:
        model_file(folder, "unet/config.json")

    def config(part: str, name: str = "config.json") -> dict[str, Any]:
        path = unet / name if part == "unet" else model_file(folder, f"{part}/{name}")
        found = read_json(path, "download it again")
        # diffusers makes the class of model_index.json, whatever the settings say; its defaults go with it.
        if part == "scheduler" and found.get("_class_name", index[part][1]) != index[part][1]:
            raise ValueError(
                f"{folder}: expected one scheduler, got {index[part][1]} in model_index.json and"
                f" {found['_class_name']!r} in scheduler/{name}"
            )
        return {"_class_name": index[part][1], **found} if part == "scheduler" else found

    def tensors(part: str, layout: weights.Layout) -> list[Tensor]:
        return read_tensors(unet if part == "unet" else folder / part, layout.basename)

    if not (folder / "tokenizer/tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            model_file(folder, f"tokenizer/{name}")
    return read_parts(config, tensors, partial(read_tokenizer, folder / "tokenizer"), reading)


def find_unet(path: Path, reading: Reading) -> Path:
    """The folder of a UNet that a training left: ``path`` itself or its ``unet``; named in what was chosen.

    Raises:
        ValueError: there is none, or beside it lies what changes its function and is not read.
    """
    path = Path(os.path.expanduser(path))
    found = next((folder for folder in (path, path / "unet") if (folder / "config.json").is_file()), None)
    if found is None:
        for file in sorted(path.iterdir()) if path.is_dir() else ():
            if (kind := adapters.kind_of(file)) in (adapters.LORA, adapters.PEFT):
                what = adapters.remedy(kind, file)
                raise ValueError(f"another `unet`: expected a folder, got {path} with {kind}, {file.name}; {what}")
        average = path / "unet_ema"
        remedy = f"; give {average}" if (average / "config.json").is_file() else ""
        raise ValueError(
            f"another `unet`: expected a folder as diffusers saves it, with config.json, or one that has it as unet,"
            f" got {path}, which {'has neither' if path.is_dir() else 'is no folder'}{remedy}"
        )
    if found != path and (path / "unet_ema").is_dir():
        reading.notes.append(f"{path}: unet is read; for the average of weights give {path / 'unet_ema'}")
    adapters.refuse_beside(found, set(files_read(found, weights.UNET.basename)), lambda: (), reading.given)
    reading.chosen["unet_weights"] = "/".join(found.resolve().parts[-2:])
    return found


def _check_index(folder: Path, index: dict[str, Any]) -> None:
    """Refuse a ``model_index.json`` with other parts than those that are read."""
    others = sorted(
        name
        for name, value in index.items()
        if not name.startswith("_") and name not in _MODEL_INDEX and value not in (None, [None, None])
    )
    if others:
        raise ValueError(
            f"{folder}: model_index.json: expected the parts of a Stable Diffusion pipeline, got also"
            f" {', '.join(others)}, which jaxmem does not read; take them out where they are not used"
        )

    for part in ("unet", "text_encoder", "vae", "tokenizer", "scheduler"):
        names = dict.fromkeys((_MODEL_INDEX[part][1], *_ALSO_READ.get(part, ())))
        found = index.get(part)
        if not isinstance(found, list) or len(found) != 2 or not _is_one_of(names, found[1]):
            remedy = f"; {OTHER_SCHEDULER}" if part == "scheduler" else ""
            if found is None or found == [None, None]:
                remedy = f"; {_ADD_IT.format(part)}"
            raise ValueError(
                f"{folder}: model_index.json: expected {part} of {' or '.join(names)}, got {found!r}{remedy}"
            )
        if found[0] != _MODEL_INDEX[part][0]:  # a file of Python in the folder, which diffusers would run
            raise ValueError(
                f"{folder}: model_index.json: expected {part} of {_MODEL_INDEX[part][0]}, got code of its own"
                f" ({found[0]!r}), whose function jaxmem does not know"
            )


def write_folder(
    folder: Path,
    configs: Configs,
    network: Callable[[str], tuple[nnx.GraphDef, nnx.State]],
    tokenizer: Any,
    dtype: Any,
) -> Path:
    """Write a model as a diffusers folder, which diffusers and `read_folder` read.

    Raises:
        ValueError: the folder exists and is not empty, or a parameter does not fit into ``dtype``.
        OSError: it cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: expected a new or empty folder, got one with files; choose another")
    unet, text_encoder, vae, scheduler = configs
    parts = (
        ("unet", unet, weights.UNET),
        ("text_encoder", text_encoder, weights.TEXT_ENCODER),
        ("vae", vae, weights.VAE),
    )
    scheduler_settings = scheduler.to_diffusers()
    for part, config, layout in parts:
        write_network(folder / part, config, network(part)[1], layout, dtype)
    (folder / "scheduler").mkdir()
    write_atomically(folder / "scheduler/scheduler_config.json", json_writer(scheduler_settings))
    tokenizer.save_pretrained(folder / "tokenizer")
    write_atomically(folder / "model_index.json", json_writer(_MODEL_INDEX))  # last: with it the folder is a model
    return folder


def write_network(folder: Path, config: Any, state: nnx.State, layout: weights.Layout, dtype: Any = np.float32) -> None:
    """Write one network of a diffusers folder: its weights and ``config.json``.

    Raises:
        ValueError: a parameter does not fit into ``dtype``.
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True)
    weights.save_state(state, folder / f"{layout.basename}.safetensors", layout, dtype)
    write_atomically(folder / "config.json", json_writer(config.to_diffusers()))


def _is_one_of(names: Collection[str], found: Any) -> bool:
    return isinstance(found, str) and found in names  # JSON has lists and objects, which have no hash
