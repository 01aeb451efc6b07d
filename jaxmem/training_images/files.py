"""Which files of a folder are images, captions and lists of them, and which file a written path means."""

import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

from jaxmem.training_images.captions import CAPTION_FILES

#: Endings of image files. Those that Pillow cannot read are images of the user all the same, and are named.
IMAGES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".tga"),
    *(".ppm", ".pgm", ".pnm", ".heic", ".heif", ".jxl"),
)
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


@dataclass
class Folder:
    """The files below a folder, by what they are, with names relative to it."""

    path: Path
    images: dict[str, Path] = field(default_factory=dict)
    captions: dict[str, Path] = field(default_factory=dict)  # by the name of their image without its ending
    metadata: dict[str, Path] = field(default_factory=dict)
    _spelt: dict[str, str] = field(default_factory=dict)
    _real: dict[str, str] = field(default_factory=dict)
    _stems: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Folder":
        """All files below a folder but hidden ones (and what macOS and Windows leave there)."""
        folder = cls(path)
        for name, file in _below(path, "", set()):
            ending = file.suffix.lower()
            if ending in IMAGES:
                folder.images[name] = file
            elif file.name.lower() in METADATA:
                folder.metadata[name] = file
            elif ending in CAPTION_FILES:
                known = folder.captions.get(stem(name))
                if known is None or CAPTION_FILES.index(ending) < CAPTION_FILES.index(known.suffix.lower()):
                    folder.captions[stem(name)] = file
        folder._index()
        return folder

    def _index(self) -> None:
        for name, file in self.images.items():
            self._spelt.setdefault(_spelling(name), name)
            self._real.setdefault(os.path.realpath(file), name)
            self._stems.setdefault(_spelling(stem(name)), []).append(name)

    def find(self, written: str, bases: tuple[Path, ...]) -> tuple[str, Path] | None:
        """The name and place of the image that a path means, which may be absolute or relative to one of the bases.

        Also found are paths with Windows' separators, accents that are composed otherwise, as macOS writes them, and
        names without an ending where one image has the name, as kohya's scripts write them.
        """
        for base in bases:
            for text in dict.fromkeys((written, PureWindowsPath(written).as_posix())):
                file = Path(os.path.abspath(base / text))
                name = self._name(file)
                if name in self.images:
                    return name, self.images[name]
                if file.is_file():
                    name = self._real.get(os.path.realpath(file), name)
                    return name, self.images.get(name, file)
                if (spelt := self._spelt.get(_spelling(name))) is not None:
                    return spelt, self.images[spelt]
                if len(same := self._stems.get(_spelling(name), [])) == 1:
                    return same[0], self.images[same[0]]
        return None

    def _name(self, file: Path) -> str:
        """Path from the folder; of a file elsewhere, whose place nobody else is told, its last two names."""
        inside = Path(os.path.abspath(self.path))
        return (file.relative_to(inside) if file.is_relative_to(inside) else Path(*file.parts[-2:])).as_posix()


def stem(name: str) -> str:
    """The name of an image as the file of its caption has it."""
    return str(PurePosixPath(name).with_suffix(""))


def _spelling(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _below(folder: Path, prefix: str, seen: set[str]) -> Iterator[tuple[str, Path]]:
    """Names and files, in the order of names; links to folders are followed once."""
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or file.name == "__MACOSX":
            continue
        if file.is_dir():
            yield from _below(file, f"{prefix}{file.name}/", seen)
        elif file.is_file() or file.is_symlink():  # a link to nothing is named as an image that is missing
            yield prefix + file.name, file
