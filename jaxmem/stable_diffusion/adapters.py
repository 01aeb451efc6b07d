"""What changes a model beside its own weights: LoRA, textual inversions, ControlNets and their kin, by their files.

A folder whose model jaxmem would read without them is refused: an audit of the base model would be a false all-clear.
Files are known by the names of their tensors, which are read without running a pickle, and by their own name where
that is impossible.
"""

import io
import pickletools
import re
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NoReturn

from safetensors import SafetensorError, safe_open

_SAFE = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_OLD_PICKLES = 4  # one after another in a file of PyTorch before 1.6: number, version, system, object
_DEPTH = 2  # folders below the model's that are looked into
# Names of low-rank and other additions to weights, as diffusers, peft, kohya and LyCORIS spell them.
_LORA = re.compile(r"(^|[._])(lora|dora|lokr|hada|oft|boft|ia3|vera)([._]|$)|(^|\.)base_layer\.", re.IGNORECASE)
_LORA_FILE = re.compile(r"(?<![a-z])lora|lora(?![a-z])|lycoris|adapter_config\.json|adapter_model", re.IGNORECASE)
_INVERSION_KEYS = {"emb_params", "string_to_param", "clip_l", "clip_g"}  # where the file's name is the word
_INVERSION_FILE = re.compile(r"learned_embeds|^<[^|].*>\.", re.IGNORECASE)
_CUSTOM_FILE = re.compile(r"custom_diffusion", re.IGNORECASE)  # also in the names of its tensors
_OTHERS = {
    "a ControlNet": ("controlnet_", "control_model.", "input_hint_block."),
    "an IP-Adapter": ("image_proj.", "ip_adapter."),
    "a T2I-Adapter": ("adapter.body.", "adapter.conv_in.", "body.0.block1.", "body.0.in_conv."),
    "a motion adapter": ("motion_modules.", "down_blocks.0.motion_modules."),
}
_IP_ADAPTER = {"image_proj", "ip_adapter"}  # of a pickle: two tables, whose own keys are numbers and plain layers

MERGE_LIVE = "pipe.fuse_lora(); pipe.unload_lora_weights()"
_CONVERT = (
    "convert it where you trust it, safetensors.torch.save_file(torch.load(file, weights_only=True), new_file), as a"
    " pickle can run any code when loaded"
)
_MERGE_PEFT = """merge it with peft and load what diffusers saves:
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.unet = PeftModel.from_pretrained(pipe.unet, adapter).merge_and_unload()  # so the text encoder's
    pipe.save_pretrained(new_folder)"""


def is_lora(tensors: Iterable[str]) -> bool:
    """Whether tensors of these names add to the weights of another model, or to those they are saved with."""
    return any(_LORA.search(name) for name in tensors)


def refuse_unmerged(tensors: Iterable[str], where: str) -> None:
    """Refuse the weights of a component with LoRA layers in it.

    Raises:
        ValueError: there are some.
    """
    found = sorted(name for name in tensors if _LORA.search(name))
    if found:
        raise ValueError(
            f"{where}: expected weights without LoRA layers, got {len(found)} tensors of such layers ({found[0]}, ...),"
            f" which are not added to the weights of a folder; merge them in the diffusers pipeline that has them:"
            f" {MERGE_LIVE}; then load it again, or save and load it"
        )


def refuse_beside(
    folder: Path,
    read: Collection[Path],
    added_tokens: Callable[[], Collection[str]],
    given: Collection[Path] = (),
) -> None:
    """Refuse a model's folder that holds files beside the model which would change its function, and are not read.

    Training checkpoints (``checkpoint-*``), pictures, optimizer states, whole checkpoints and other files of weights
    stay: nothing that reads the model would take them in.

    Args:
        folder: of the model; without a ``model_index.json`` its own files only are looked at.
        read: the files whose every tensor the loader accounts for (`refuse_unmerged`).
        added_tokens: gives the tokens that the model's tokenizer has beside CLIP's; asked where there are textual
            inversions.
        given: files that are put into the model, with links followed.

    Raises:
        ValueError: naming every such file, with what to do.
    """
    known: Collection[str] | None = None
    found: dict[str, list[str]] = {}
    first: dict[str, Path] = {}
    for path in _files(folder, _DEPTH if (folder / "model_index.json").is_file() else 0):
        kind = None if path in read or path.resolve() in given else kind_of(path)
        name = str(path.relative_to(folder))
        if kind == INVERSION:
            known = added_tokens() if known is None else known
            missing = [word for word in _inverted(path, known) if word not in known]
            if not missing:
                continue
            name += f" ({', '.join(missing)}, not in the tokenizer)"
        if kind is not None and kind != CHECKPOINT:
            found.setdefault(kind, []).append(name)
            first.setdefault(kind, path)
    if found:
        problems = [f"{_few(names)}: {kind}; {remedy(kind, first[kind])}" for kind, names in found.items()]
        raise ValueError(
            f"{folder}: expected a model alone, got files in it that change its function and that jaxmem does not"
            " read; for the model without them, move them elsewhere:\n  " + "\n  ".join(problems)
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def refuse_listed(repository: str, revision: str | None, files: Iterable[str]) -> None:
    """Refuse a repository of the hub for what its list of files tells, before anything is downloaded.

    Raises:
        ValueError: naming every such file, with what to do.
    """
    found = []
    for file in files:
        path = PurePosixPath(file)
        loadable = path.suffix.lower() in (_SAFE, *PICKLES) or path.name == "adapter_config.json"
        if len(path.parts) <= _DEPTH and not _is_passed_over(path.parts[0]) and loadable:
            found += [file] if _LORA_FILE.search(path.name) or _CUSTOM_FILE.search(path.name) else []
    if found:
        at = "" if revision is None else f"revision={revision!r}, "
        raise ValueError(
            f"{repository}: expected a model alone, got LoRA files or others beside it that change its function and"
            f" that jaxmem does not read ({_few(found)}); give the folder of a download without them, and a LoRA that"
            f" you want in it as `lora`:\n    huggingface_hub.snapshot_download({repository!r}, {at}"
            f"ignore_patterns={found!r}, local_dir=new_folder)"
        )


def may_be_inversion(file: str) -> bool:
    """Whether a file of a repository, by its name, is a textual inversion beside its model."""
    return "/" not in file and _INVERSION_FILE.search(file) is not None


def refuse_file(path: Path) -> NoReturn:
    """Say what a file is that was given in place of a model's folder.

    Raises:
        ValueError: always.
    """
    kind = kind_of(path)
    homes = [folder for folder in (path.parent, path.parent.parent) if (folder / "model_index.json").is_file()]
    if kind is None and homes:
        what = f"it belongs to the model in {homes[0]}; give that folder"
    elif kind is None or path.suffix.lower() in PICKLES:
        what = (
            "of files jaxmem.load opens whole .safetensors checkpoints of Stable Diffusion; others, and pickles that"
            " you trust, are converted with diffusers:"
            " StableDiffusionPipeline.from_single_file(file).save_pretrained(folder)"
        )
    elif kind == CHECKPOINT:
        what = "jaxmem.load opens it"
    else:
        what = remedy(kind, path)
        if kind in (LORA, INVERSION):
            what = f"give the model that it was made for as well; {what}"
    raise ValueError(f"{path}: expected the folder of a diffusers model, got {kind or 'a file'}; {what}")


def kind_of(path: Path) -> str | None:
    """What a file is, if it is something that changes a model or a model of its own."""
    if path.name == "adapter_config.json":
        return PEFT
    if path.name.startswith("adapter_model.") and path.with_name("adapter_config.json").is_file():
        return PEFT
    if path.suffix.lower() not in (_SAFE, *PICKLES):
        return None
    names = _names(path)
    if any(map(_CUSTOM_FILE.search, names)) or _CUSTOM_FILE.search(path.name):
        return _CUSTOM
    if is_lora(names) or (not names and _LORA_FILE.search(path.name)):
        return LORA
    for kind, starts in _OTHERS.items():
        if any(name.startswith(starts) for name in names):
            return kind
    if set(names) >= _IP_ADAPTER:
        return "an IP-Adapter"
    if any(name.startswith(("model.diffusion_model.", "first_stage_model.")) for name in names):
        return CHECKPOINT
    # A pickle has other texts beside its words: those of the functions that rebuild its tensors.
    every = all if path.suffix.lower() == _SAFE else any
    is_inversion = bool(_INVERSION_KEYS & set(names)) or (len(names) > 0 and every(map(_is_word, names)))
    return INVERSION if is_inversion or _INVERSION_FILE.search(path.name) else None


LORA = "a LoRA"
PEFT = "a LoRA of peft"
INVERSION = "a textual inversion"
CHECKPOINT = "a whole checkpoint"
_CUSTOM = "layers of Custom Diffusion"


def remedy(kind: str, path: Path) -> str:
    """What to do about a file of a kind that changes a model."""
    if kind in (LORA, INVERSION):
        name, does = ("lora", "fuses") if kind == LORA else ("embedding", "adds")
        if path.suffix.lower() in PICKLES:
            return f"{_CONVERT}; jaxmem.load {does} the new file, given as `{name}`"
        return f"jaxmem.load {does} it: `{name}={[str(path)]!r}`"
    if kind == PEFT:
        return _MERGE_PEFT
    if kind == _CUSTOM:
        return "jaxmem does not have these layers of attention, and diffusers has no call that merges them"
    return "jaxmem computes the score of a prompt alone, which has no input for it"


def _is_word(tensor: str) -> bool:
    return re.fullmatch(r"<[^|].*>", tensor) is not None  # not CLIP's own <|endoftext|>


def _is_passed_over(folder: str) -> bool:
    return folder.startswith(("checkpoint-", "."))


def _files(folder: Path, depth: int) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            yield path
        elif depth and not _is_passed_over(path.name) and not (path / "model_index.json").is_file():
            yield from _files(path, depth - 1)


def _names(path: Path) -> list[str]:
    """The names of a file's tensors, and of a pickle, which is looked through and not run, all texts in it.

    None where it is damaged or of another format.
    """
    try:
        if path.suffix.lower() == _SAFE:
            with safe_open(path, framework="numpy") as file:
                return list(file.keys())
        if not zipfile.is_zipfile(path):  # as PyTorch before 1.6 saved
            with path.open("rb") as file:
                return sorted(_texts(file))
        with zipfile.ZipFile(path) as archive:
            inside = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            return sorted(_texts(io.BytesIO(archive.read(inside))))
    except (SafetensorError, OSError, zipfile.BadZipFile, StopIteration, ValueError, RuntimeError):
        return []


def _texts(stream: io.BytesIO | io.BufferedReader) -> set[str]:
    """The texts of the pickles that a stream begins with: its number, version and system in PyTorch's old format."""
    found: set[str] = set()
    try:
        for _ in range(_OLD_PICKLES):
            found.update(text for _, text, _ in pickletools.genops(stream) if isinstance(text, str))
    except (ValueError, OverflowError, MemoryError):  # the end, or no pickle, whose lengths can be anything
        pass
    return found


def _inverted(path: Path, known: Collection[str]) -> list[str]:
    """The words of a textual inversion; of a pickle, with its many other texts, those that are known or look so."""
    names = _names(path)
    if path.suffix.lower() != _SAFE:
        names = [name for name in names if name in known or _is_word(name)]
    return [path.stem] if not names or _INVERSION_KEYS & set(_names(path)) else names
