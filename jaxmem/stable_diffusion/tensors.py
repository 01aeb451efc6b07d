"""Tensors of a checkpoint, from safetensors files or a live module: names and shapes now, numbers at their turn."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxmem.runs.durable import read_json

_TORCH_NAMES = {"torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
_MAPPED_BYTES = 32 * 2**20  # read before a file is mapped anew; the pages of a mapping count as the process's memory


class Tensor(NamedTuple):
    """One tensor of a checkpoint: what it is, and how to read it when its turn comes."""

    name: str  #: its key in the file
    shape: tuple[int, ...]
    dtype: str  #: in safetensors' spelling
    where: str  #: the file
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Of numbers in it."""
        return math.prod(self.shape)


def refuse(problems: list[str], where: str, shown: int = 12) -> None:
    """Raise a ValueError of all problems."""
    if problems:
        more = [f"... and {len(problems) - shown} more"] if len(problems) > shown else []
        raise ValueError(
            f"{where}: {len(problems)} problem{'s' if len(problems) > 1 else ''} with the weights; nothing was loaded."
            f" Check that the weights and config.json belong together:\n  " + "\n  ".join(problems[:shown] + more)
        )


def read_tensors(folder: Path, basename: str) -> list[Tensor]:
    """The tensors of a component's folder: one file or an index of several; fp16 files where there are no others.

    Raises:
        ValueError: there are no safetensors files (pickles are refused: loading one runs whatever it holds), a file is
            damaged, or the index and its files disagree.
    """
    file = _chosen(folder, basename)
    if file is not None:
        return _read_index(file) if file.suffix == ".json" else read_file(file)
    found = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
    if found:
        raise ValueError(
            f"{folder}: expected {basename}.safetensors, got only pickles ({', '.join(found)}), which can run any code"
            f" when loaded; convert them where you trust them: load the pipeline with diffusers and call"
            f" save_pretrained(folder, safe_serialization=True)"
        )
    raise ValueError(f"{folder}: expected {basename}.safetensors, got no such file; is the download complete?")


def _chosen(folder: Path, basename: str) -> Path | None:
    """The file or the index that `read_tensors` reads."""
    for variant in ("", ".fp16"):
        single = folder / f"{basename}{variant}.safetensors"
        index = folder / f"{basename}.safetensors.index{variant}.json"
        if single.is_file() and index.is_file():
            raise ValueError(f"{folder}: expected {single.name} or {index.name}, got both; remove the one that is old")
        if single.is_file() or index.is_file():
            return single if single.is_file() else index
    return None


def files_read(folder: Path, basename: str) -> list[Path]:
    """The files of tensors that `read_tensors` reads; nothing where there are none.

    Raises:
        ValueError: as `read_tensors` about the choice and the index.
    """
    file = _chosen(folder, basename)
    if file is None:
        return []
    return [folder / name for name in _shards(file)[1]] if file.suffix == ".json" else [file]


def _shards(path: Path) -> tuple[dict[str, str], list[str]]:
    """An index's object of tensor names and files, and the files."""
    content = read_json(path, "download it again").get("weight_map")
    if not isinstance(content, dict) or not content or not all(isinstance(name, str) for name in content.values()):
        raise ValueError(f'{path}: expected "weight_map", an object of tensor names and files, got {content!r:.80}')
    files = sorted(set(content.values()))
    for name in files:
        # A bare name: nothing outside the folder is opened, whatever the index says.
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(f"{path}: expected names of .safetensors files in its own folder, got {name!r}")
        if not (path.parent / name).is_file():
            raise ValueError(f"{path}: expected the file {name} beside it, got no such file; is the download complete?")
    return content, files


def _read_index(path: Path) -> list[Tensor]:
    content, files = _shards(path)
    tensors = [tensor for name in files for tensor in read_file(path.parent / name)]
    there = {(tensor.name, tensor.where) for tensor in tensors}
    listed = set(content.items())
    refuse(
        [f"{name}: listed in {file}, not there" for name, file in sorted(listed - there)]
        + [f"{name}: in {file}, not listed for it" for name, file in sorted(there - listed)],
        str(path),
    )
    return tensors


def read_file(path: Path) -> list[Tensor]:
    """The tensors of one safetensors file.

    Raises:
        ValueError: it is damaged.
    """
    with _clear_errors(path), safe_open(path, framework="numpy") as file:
        slices = {name: file.get_slice(name) for name in file.offset_keys()}  # in the order of the bytes: one pass
        found = {name: (tuple(part.get_shape()), str(part.get_dtype())) for name, part in slices.items()}
    # NumPy alone does not know bfloat16; JAX's registered types do, for one more copy.
    reader = _Mapped(path, "flax" if any(dtype == "BF16" for _, dtype in found.values()) else "numpy")
    return [Tensor(name, shape, dtype, path.name, partial(reader.read, name)) for name, (shape, dtype) in found.items()]


class _Mapped:
    """Reads tensors of one file; lets go of the mapping now and then, so that its pages do not add up."""

    def __init__(self, path: Path, framework: str) -> None:
        self.path, self.framework = path, framework
        self.file: Any = None
        self.bytes = 0

    def read(self, name: str) -> np.ndarray:
        with _clear_errors(self.path):
            if self.file is None:
                self.file = safe_open(self.path, framework=self.framework)
            array = np.asarray(self.file.get_tensor(name))
        self.bytes += array.nbytes
        if self.bytes > _MAPPED_BYTES:
            self.file, self.bytes = None, 0
        return array


@contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"{path}: expected a whole .safetensors file, got a damaged one ({error}); download it again"
        ) from None


def from_torch(state_dict: Mapping[str, Any], where: str) -> list[Tensor]:
    """The tensors of a live PyTorch module's ``state_dict()``; PyTorch itself is not imported."""

    def one(name: str, tensor: Any) -> Tensor:
        if getattr(tensor, "is_meta", False):
            raise ValueError(f"{where}: {name} is offloaded; load the pipeline without device_map or CPU offload")
        dtype = _TORCH_NAMES.get(str(tensor.dtype), str(tensor.dtype))
        # A copy: JAX takes an array over as it is, and the live module may be trained further.
        return Tensor(name, tuple(tensor.shape), dtype, where, lambda: np.array(tensor.detach().cpu().float().numpy()))

    return [one(name, tensor) for name, tensor in state_dict.items()]
