"""`jaxmem.load`: a model of any source, told apart by the class that made it."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmem.model import Model
from jaxmem.pipelines import FAMILIES, from_pipeline
from jaxmem.runs.durable import read_json
from jaxmem.runs.manifest import is_run
from jaxmem.runs.progress import Say, quiet
from jaxmem.sources.additions import Additions
from jaxmem.sources.merge import fuse_active, has_lora, put_into
from jaxmem.sources.opened import copy_of, open_any, open_folder, replace_network, replace_unet
from jaxmem.sources.single_file import is_checkpoint, open_single_file
from jaxmem.stable_diffusion import live
from jaxmem.stable_diffusion.components import PIPELINES
from jaxmem.stable_diffusion.hub import find_model
from jaxmem.stable_diffusion.live_comparison import compare
from jaxmem.stable_diffusion.pipeline import StableDiffusion
from jaxmem.stable_diffusion.settings import Reading, as_list


def load(
    source: Any,
    *,
    lora: Sequence[str | Path] = (),
    embedding: Sequence[str | Path] = (),
    unet: str | Path | None = None,
    clip_skip: int | None = None,
    height: int | None = None,
    width: int | None = None,
    parameters: str = "float32",
    ignore_settings: Sequence[str] = (),
    prediction_type: str | None = None,
    say: Say = quiet,
) -> Model:
    """Open a model: a diffusers folder, a hub id, a single file, a live pipeline, or a run of ``reproduce mnist``.

    Stable Diffusion 1 and 2 are read by `jaxmem.StableDiffusion`, from folders without torch. Single files, LoRA,
    embeddings and pipelines of other classes (`jaxmem.pipelines.FAMILIES`) are opened by diffusers
    (``pip install 'jaxmem[diffusers]'``) and taken from its pipeline; a pipeline of yours stays as it is.

    Args:
        source: the model. ``"owner/name"`` and ``"owner/name@revision"`` are the hub's; a `Path`, and a text that looks
            like one, is never looked up there. A single file is a ``.safetensors`` of Stable Diffusion's own layout.
        lora: files of LoRA (diffusers', PEFT's and kohya's layouts), each fused into the weights, in this order;
            ``"file.safetensors:0.7"`` with a scale. A folder stands for its ``pytorch_lora_weights.safetensors``.
        embedding: ``.safetensors`` files of textual inversions; a file that does not have its word is called by the
            file's name.
        unet: a folder of another UNet, or transformer, that replaces the model's: ``checkpoint-500/unet``,
            ``checkpoint-500/unet_ema``, or ``checkpoint-500``, which is its ``unet``.
        clip_skip: last layers of the text encoder that are left out, as diffusers counts; other programs' 2 is 1 here.
        height: of pictures, in pixels; by default the model's own. Latents of another size have another distribution
            than the model was trained on, and spectra of another dimension.
        width: of pictures, in pixels; by default the model's own.
        parameters: in what type the network's are kept: "float32", or "bfloat16", in which they take half the memory
            and are rounded, which makes another model (`from_torch`); not for Stable Diffusion 1 and 2.
        ignore_settings: as `StableDiffusion.load`.
        prediction_type: as `StableDiffusion.load`.
        say: told of what may surprise, and of comparisons with a pipeline's networks.

    Raises:
        ValueError: it is not there, jaxmem does not have its architecture, it is incomplete or damaged, or a choice has
            no place in it; as `StableDiffusion.load`.
        MissingExtra: it needs diffusers and torch, and they are not installed.
        OSError: the hub cannot be reached.

    Warns:
        UserWarning: the model may not be what its files make of it (`Model.warnings`).
    """
    if parameters not in ("float32", "bfloat16"):
        raise ValueError(f"parameters: expected 'float32' or 'bfloat16', got {parameters!r}")
    reading = Reading(
        as_list("ignore_settings", ignore_settings),
        prediction_type,
        unet=None if unet is None else Path(unet),
        clip_skip=0 if clip_skip is None else clip_skip,
        height=height,
        width=width,
        parameters=parameters,
    )
    additions = Additions.read(as_list("lora", lora), as_list("embedding", embedding))
    reading.given = additions.files
    model = _dispatch(source, additions, reading, say)
    for note in dict.fromkeys(reading.notes):
        say(note)
    for text in model.warnings:
        warnings.warn(text, stacklevel=2)
    return model


def _dispatch(source: Any, additions: Additions, reading: Reading, say: Say) -> Model:
    if is_run(source):
        return _trained(source, additions, reading)
    if not isinstance(source, str | Path):
        name = type(source).__name__
        # What is no pipeline at all is refused by the port, which says what it lacks.
        if name in PIPELINES or not hasattr(source, "components"):
            return _of_live(source, additions, reading, say)
        return _of_pipeline(source, name, "live pipeline", additions, reading, say)
    path = Path(os.path.expanduser(source))
    if path.is_file() and is_checkpoint(path):
        pipeline = open_single_file(path, reading)
        replace_unet(pipeline, reading)
        return _of_own(pipeline, additions, reading, say)
    folder = find_model(source, reading.notes, with_unet=reading.unet is None)
    index = folder / "model_index.json"
    made_by = read_json(index, "download it again").get("_class_name") if index.is_file() else PIPELINES[0]
    if made_by not in PIPELINES:
        return _of_pipeline(folder if path.is_dir() else source, made_by, str(source), additions, reading, say)
    if additions:
        return _of_own(open_folder(folder, str(made_by), reading), additions, reading, say)
    return StableDiffusion.read(folder, reading, say)


def _of_live(pipeline: Any, additions: Additions, reading: Reading, say: Say) -> StableDiffusion:
    """Of a user's pipeline, which is not changed: LoRA that is active in it is fused in a copy."""
    adapted = has_lora(pipeline)
    if not (additions or adapted or reading.unet):
        return StableDiffusion.read(pipeline, reading, say)
    if adapted and reading.unet:
        raise ValueError(
            "another `unet`: expected none for a pipeline with LoRA in it, which it would lose; give the LoRA as `lora`"
            " with the model that it was made for"
        )
    live.check(pipeline, with_lora=True)
    copied = copy_of(pipeline)
    replace_unet(copied, reading)
    if not adapted:
        return _of_own(copied, additions, reading, say)
    fuse_active(copied)
    model = _of_own(copied, additions, reading, say)
    if not additions:  # what was fused is what the pipeline computes
        for part in ("unet", "text_encoder"):
            say(f"{part}: compared with the live pipeline's, whose LoRA is not fused")
            compare(getattr(pipeline, part), part, *model.network(part))
    return model


def _of_own(pipeline: Any, additions: Additions, reading: Reading, say: Say) -> StableDiffusion:
    """Of a pipeline that nobody else has."""
    put_into(pipeline, additions, reading, say)
    model = StableDiffusion.read(pipeline, reading, say)
    model.settle()
    return model


def _of_pipeline(source: Any, name: Any, where: str, additions: Additions, reading: Reading, say: Say) -> Model:
    """Of any other class of diffusers, by the pipeline itself; ``source`` is one, a folder or a hub id."""
    if name not in FAMILIES:
        known = ", ".join((*PIPELINES, *FAMILIES))
        raise ValueError(f"{where}: expected a pipeline of {known}, got {name!r}, whose network jaxmem does not know")
    if additions.embedding:
        raise ValueError(f"embedding: expected none for a {name}, which has other text encoders, got one")
    ours = isinstance(source, str | Path)
    if not ours and (additions.lora or reading.unet):
        given = "lora" if additions.lora else "unet"
        raise ValueError(f"{given}: expected none for a live {name}, got one; put it into the pipeline with diffusers")
    pipeline = open_any(source, reading, say) if ours else source
    replace_network(pipeline, reading)
    put_into(pipeline, additions, reading, say)
    say(f"{name}: its network is compared with torch's at a random point")
    model = from_pipeline(pipeline, reading, ours=ours)
    reading.finish()
    return model


def _trained(source: Any, additions: Additions, reading: Reading) -> Model:
    """The network that a run trained; choices about a model's files have no meaning there."""
    from jaxmem.experiments.mnist import load_model

    given = [name for name, value in (("lora", additions.lora), ("embedding", additions.embedding)) if value]
    given += [name for name in ("unet", "clip_skip", "height", "width", "prediction_type") if getattr(reading, name)]
    given += ["parameters"] if reading.parameters != "float32" else []
    given += ["ignore_settings"] if reading.ignore_settings else []
    if given:
        raise ValueError(f"a run of jaxmem ({source}) has no files of diffusers: expected no `{given[0]}`, got one")
    return load_model(source)
