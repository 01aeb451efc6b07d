"""Where a model's files are: a folder on this machine, or the Hugging Face hub's cache of one."""

import difflib
import os
import re
from pathlib import Path
from typing import Any

from jaxmem.stable_diffusion import adapters

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".pkl", ".zip", ".json", ".onnx", ".gguf")
_PARTS = ("unet", "text_encoder", "vae")
_ASK_HUB = "start in another directory to ask the hub for"
_ALIKE = 0.75  # of `difflib`: one wrong, missing or exchanged letter in a name of five
# Seconds for the hub's first answer: what to wait where the cache has the model, and where it has not (the hub's own).
_PATIENCE, _LONG_PATIENCE = 3, 10


def find_model(source: str | Path, notes: list[str] | None = None) -> Path:
    """The folder of a model: ``source`` itself, or what the hub has under that id, downloaded once.

    A `Path`, and a text that looks like one, is never looked up on the hub: its name would be sent out. Where the hub
    cannot be asked, its cache is taken, which may be old or not whole, and ``notes`` gets a line that says so.

    Raises:
        ValueError: there is no such folder and it is no hub id, or the hub has no usable files for it.
        OSError: the hub cannot be reached and the model is not in its cache.
    """
    folder = Path(os.path.expanduser(source))  # leaves an unknown ~user as it is
    if folder.is_dir():
        return folder
    if folder.exists():
        adapters.refuse_file(folder)
    name = str(source)
    is_id = isinstance(source, str) and _HUB_ID.fullmatch(name) and not name.lower().endswith(_FILES)
    if not is_id or Path(name).parent.exists():
        like = _nearest(folder)
        # An id, but its owner is called as a folder here is.
        asking = f"; {Path(name).parent} is a folder here, so the hub was not asked: {_ASK_HUB} {name}"
        raise ValueError(
            f"{name}: expected the folder of a diffusers model or a hub id (owner/name), got neither: there is no such"
            f" folder{f'; did you mean {like}?' if like else ''}{asking if is_id else ''}"
        )
    cached = _cached(name)
    if cached is None and (like := _nearest(folder)) is not None:
        raise ValueError(
            f"{name}: expected a folder or a hub id, got what may be either: there is no such folder, but there is"
            f" {like}, so the hub was not asked; give that one, or {_ASK_HUB} {name}"
        )
    return _download(name, cached, [] if notes is None else notes)


def _nearest(path: Path) -> Path | None:
    """An existing folder whose path is like this one: each part the same, or the most alike of what is there."""
    found = Path(path.anchor)
    for part in path.parts[bool(path.anchor) :]:
        if part == ".." or (found / part).is_dir():
            found /= part
            continue
        try:
            there = [entry.name for entry in os.scandir(found) if entry.is_dir()]
        except OSError:
            return None
        alike = difflib.get_close_matches(part, there, 1, _ALIKE)
        if not alike:
            return None
        found /= alike[0]
    return found


def _cached(name: str) -> Path | None:
    """The newest snapshot in the hub's cache, asked of nobody; what it lacks is said when it is read."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "model_index.json")
    return Path(found).parent if isinstance(found, str) else None


def _download(name: str, cached: Path | None, notes: list[str]) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        # One request without retries, unlike the other ways to list files: with a full cache nobody should wait.
        siblings = HfApi().model_info(name, timeout=_LONG_PATIENCE if cached is None else _PATIENCE).siblings or []
        files = [sibling.rfilename for sibling in siblings]
    except Exception as error:  # of the network, in many libraries' types
        if cached is not None:
            notes.append(_from_cache(name, cached, error))
            return cached
        if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
            raise ValueError(f"{name}: no such folder here and no such model on the hub ({error})") from None
        raise _unreachable(name, error) from None
    adapters.refuse_listed(name, files)
    try:
        return Path(snapshot_download(name, allow_patterns=wanted_files(files)))
    except Exception as error:
        if cached is not None:
            notes.append(_from_cache(name, cached, error))
            return cached
        raise _unreachable(name, error) from None


def _from_cache(name: str, cached: Path, error: Exception) -> str:
    return f"{name}: hub not reached ({type(error).__name__}); taken from the cache, snapshot {cached.name[:12]}"


def _unreachable(name: str, error: Exception) -> OSError:
    return OSError(
        f"{name}: no such folder here, the hub cannot be reached or refuses ({type(error).__name__}: {error}), and its"
        f" cache does not have the model; give a folder, or try again with a connection (for gated models after"
        f" accepting their terms on their page, and hf auth login)"
    )


def wanted_files(files: list[str]) -> list[str]:
    """Of a repository's files those that jaxmem reads; fp16 weights only where a part has no others."""
    wanted = [file for file in files if file == "model_index.json" or file.startswith(("tokenizer/", "scheduler/"))]
    wanted += [file for file in files if adapters.may_be_inversion(file)]  # of words that the tokenizer may not have
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
