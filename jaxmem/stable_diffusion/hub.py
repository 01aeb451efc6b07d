"""Where a model's files are: a folder on this machine, or the Hugging Face hub's cache of one."""

import difflib
import os
import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jaxmem.runs.durable import read_json
from jaxmem.stable_diffusion import adapters
from jaxmem.stable_diffusion.components import PIPELINES

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
_FILES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".pkl", ".zip", ".json", ".onnx", ".gguf")
_PARTS = ("unet", "text_encoder", "vae")
_INDEX = "model_index.json"
_ASK_HUB = "start in another directory to ask the hub for"
_ALIKE = 0.75  # of `difflib`: one wrong, missing or exchanged letter in a name of five
# Seconds for the hub's first answer: what to wait where the cache has the model, and where it has not (the hub's own).
_PATIENCE, _LONG_PATIENCE = 3, 10


class OnHub(NamedTuple):
    """A model of the hub."""

    name: str  #: owner/name
    revision: str | None  #: branch, tag or commit, after an @ in what was given

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def hub_id(source: Any) -> OnHub | None:
    """The hub's id that a source of a model would be, where there is no such folder."""
    found = _HUB_ID.fullmatch(source) if isinstance(source, str) else None
    return None if found is None or source.lower().endswith(_FILES) else OnHub(found[1], found[2])


def find_model(source: str | Path, notes: list[str] | None = None, *, with_unet: bool = True) -> Path:
    """The folder of a model: ``source`` itself, or what the hub has under that id, downloaded once.

    A `Path`, and a text that looks like one, is never looked up on the hub: its name would be sent out. Where the hub
    cannot be asked, its cache is taken, which may be old or not whole, and ``notes`` gets a line that says so. Of other
    pipelines than Stable Diffusion 1 and 2 the folder may have the index alone. Without ``with_unet`` the weights of
    the UNet are not downloaded.

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
    on_hub = hub_id(source)
    if on_hub is None or Path(name).parent.exists():
        like = _nearest(folder)
        # An id, but its owner is called as a folder here is.
        asking = f"; {Path(name).parent} is a folder here, so the hub was not asked: {_ASK_HUB} {name}"
        raise ValueError(
            f"{name}: expected the folder of a diffusers model or a hub id (owner/name), got neither: there is no such"
            f" folder{f'; did you mean {like}?' if like else ''}{asking if on_hub else ''}"
        )
    cached = _cached(on_hub)
    if cached is None and (like := _nearest(folder)) is not None:
        raise ValueError(
            f"{name}: expected a folder or a hub id, got what may be either: there is no such folder, but there is"
            f" {like}, so the hub was not asked; give that one, or {_ASK_HUB} {name}"
        )
    return _download(on_hub, cached, [] if notes is None else notes, with_unet)


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


def _cached(name: OnHub) -> Path | None:
    """The newest snapshot in the hub's cache, asked of nobody; what it lacks is said when it is read."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name.name, _INDEX, revision=name.revision)
    return Path(found).parent if isinstance(found, str) else None


def _download(name: OnHub, cached: Path | None, notes: list[str], with_unet: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        # One request without retries, unlike the other ways to list files: with a full cache nobody should wait.
        patience = _LONG_PATIENCE if cached is None else _PATIENCE
        found = HfApi().model_info(name.name, revision=name.revision, timeout=patience)
        files = [sibling.rfilename for sibling in found.siblings or []]
    except Exception as error:  # of the network, in many libraries' types
        missing = isinstance(error, RepositoryNotFoundError | RevisionNotFoundError)
        if cached is None and missing and not isinstance(error, GatedRepoError):
            raise ValueError(f"{name}: no such folder here and no such model on the hub ({error})") from None
        return _instead(name, cached, notes, error)
    get = partial(snapshot_download, name.name, revision=name.revision)
    try:
        folder = Path(get(allow_patterns=[_INDEX]))
    except Exception as error:
        return _instead(name, cached, notes, error)
    if _is_other(folder):
        return folder
    adapters.refuse_listed(name.name, name.revision, files)
    try:
        return Path(get(allow_patterns=wanted_files(files, with_unet)))
    except Exception as error:
        return _instead(name, cached, notes, error)


def _is_other(folder: Path) -> bool:
    """Whether it is another pipeline than those whose files are known here."""
    index = folder / _INDEX
    return index.is_file() and read_json(index, "download it again").get("_class_name") not in PIPELINES


def _instead(name: OnHub, cached: Path | None, notes: list[str], error: Exception) -> Path:
    """What is in the cache, in place of what the hub could not be asked for."""
    if cached is not None:
        notes.append(
            f"{name}: hub not reached ({type(error).__name__}); taken from the cache, snapshot {cached.name[:12]}"
        )
        return cached
    raise OSError(
        f"{name}: no such folder here, the hub cannot be reached or refuses ({type(error).__name__}: {error}), and its"
        f" cache does not have the model; give a folder, or try again with a connection (for gated models after"
        f" accepting their terms on their page, and hf auth login)"
    ) from None


def wanted_files(files: list[str], with_unet: bool = True) -> list[str]:
    """Of a repository's files those that jaxmem reads; fp16 weights only where a part has no others."""
    wanted = [file for file in files if file == "model_index.json" or file.startswith(("tokenizer/", "scheduler/"))]
    wanted += [file for file in files if adapters.may_be_inversion(file)]  # of words that the tokenizer may not have
    for part in _PARTS if with_unet else _PARTS[1:]:
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
