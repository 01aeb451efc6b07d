"""Where a model's files are: a folder on this machine, or the Hugging Face hub's cache of one."""

import os
import re
from pathlib import Path
from typing import Any

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PARTS = ("unet", "text_encoder", "vae")


def find_model(source: str) -> Path:
    """The folder of a model: ``source`` itself, or what the hub has under that id, downloaded once.

    Raises:
        ValueError: there is no such folder and it is no hub id, or the hub has no usable files for it.
        OSError: the hub cannot be reached and the model is not in its cache.
    """
    folder = Path(os.path.expanduser(source))  # leaves an unknown ~user as it is
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(
            f"{source}: expected the folder of a diffusers model, got a file; single-file checkpoints are converted"
            f" with diffusers: StableDiffusionPipeline.from_single_file(file).save_pretrained(folder)"
        )
    if not _HUB_ID.fullmatch(source):
        raise ValueError(f"{source}: expected the folder of a diffusers model or a hub id (owner/name), got neither")
    return _download(source)


def _download(name: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        files = HfApi().list_repo_files(name)
    except RepositoryNotFoundError as error:
        raise ValueError(f"{name}: no such folder here and no such model on the hub ({error})") from None
    except Exception as error:  # of the network, in many libraries' types: the cache may still have it
        try:
            return Path(snapshot_download(name, local_files_only=True))
        except LocalEntryNotFoundError:
            raise OSError(
                f"{name}: no such folder here, the hub cannot be reached ({type(error).__name__}), and its cache does"
                f" not have the model; give a folder, or try again with a connection"
            ) from None
    return Path(snapshot_download(name, allow_patterns=wanted_files(files)))


def wanted_files(files: list[str]) -> list[str]:
    """Of a repository's files those that jaxmem reads; fp16 weights only where a part has no others."""
    wanted = [file for file in files if file == "model_index.json" or file.startswith(("tokenizer/", "scheduler/"))]
    for part in _PARTS:
        inside = [file for file in files if file.startswith(f"{part}/")]
        weights = [file for file in inside if ".safetensors" in file and "non_ema" not in file]
        full = [file for file in weights if ".fp16" not in file]
        wanted += [file for file in inside if file == f"{part}/config.json"] + (full or weights)
    return wanted


def model_file(folder: Path, name: str) -> Path:
    """A file that a model has to have.

    Raises:
        ValueError: it is not there.
    """
    path = folder / name
    if not path.is_file():
        raise ValueError(
            f"{folder}: expected a diffusers model (model_index.json, unet/, text_encoder/, vae/, tokenizer/,"
            f" scheduler/), got no {name}"
        )
    return path


def read_tokenizer(folder: Path) -> Any:
    """The CLIP tokenizer of a folder.

    Raises:
        ValueError: its files are damaged.
    """
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(folder)
    except Exception as error:  # JSON, Unicode and tokenizer errors of several libraries
        raise ValueError(f"{folder}: expected a CLIP tokenizer, got damaged files ({error})") from None
