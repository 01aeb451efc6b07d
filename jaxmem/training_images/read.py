"""Training images from a folder, or from a table or JSON file that lists them, with their captions."""

import hashlib
import re
from collections import Counter
from pathlib import Path, PurePosixPath

from jaxmem.extras import require
from jaxmem.training_images.captions import LISTINGS, read_listing, variants
from jaxmem.training_images.files import Folder, stem
from jaxmem.training_images.images import TrainingImage, TrainingImages, refuse
from jaxmem.training_images.preparation import decoded

_KOHYA = re.compile(r"([0-9]+)_(.*)", re.DOTALL)
_REMEDY = "mend these files, or take them and their captions away"


def read_training_images(source: str | Path, *, captions: str | Path | None = None) -> TrainingImages:
    """The images of a training set and their captions, after each file was read to its end.

    A folder: every image in it and in its folders, but hidden files. Captions, the first of these that there is:

    1. ``metadata.csv`` or ``metadata.jsonl``, one for each folder or one for all below it: columns ``file_name`` and
       ``text`` (or ``prompt``, ``caption``), a list of texts being variants;
    2. a file beside the image, of the same name and ending in ``.txt`` or else ``.caption``: each line is a variant;
    3. kohya's names of folders: an image directly in ``10_sks dog`` is shown 10 times in an epoch, with the caption
       "sks dog". Only names of folders below ``source`` count, and none where metadata is; ``0_`` leaves images out.

    A file ``.csv``, ``.tsv``, ``.jsonl`` or ``.json``: the images that it lists, by a column of paths relative to it,
    or as {path: caption}, also in kohya's form. An image in several rows is shown once for each, with all captions.

    An image without a caption is allowed; so are files of text that belong to no image,
    which are not read: `TrainingImages.unused` names them.

    Args:
        source: the folder, or the file that lists images.
        captions: where the captions of a folder are, if not in it: a file as above, whose paths are relative to the
            folder or to the file, or a folder of caption files that is laid out as the one of images is.

    Raises:
        ValueError: ``source`` is neither of these, or has no image; or images are damaged, are none though they are
            called so, or are missing though they have a caption; or captions cannot be read. One error says it all: the
            first ten, by name, and the number of the others.
        ImportError: Pillow is missing.
    """
    source, place = Path(source), None if captions is None else Path(captions)
    _check(source, place)
    folder = Folder.read(source) if source.is_dir() else Folder(source.parent)
    beside = Folder.read(place).captions if place is not None and place.is_dir() else folder.captions
    problems: list[str] = []
    listings = _listings(source, place, folder, problems)
    listed = _listed(listings, folder, problems)
    files = {name: file for name, (file, _) in listed.items()} | folder.images
    images = []
    for name in sorted(files):
        repeats, texts = (1, ()) if listings else _of_folder(name)
        if repeats == 0:
            continue
        try:
            if stem(name) in beside:
                texts = variants(beside[stem(name)], f"caption of {name}") or texts
        except ValueError as error:
            problems.append(str(error))
        if name in listed:
            rows = listed[name][1]
            repeats, texts = len(rows), tuple(dict.fromkeys(text for row in rows for text in row)) or texts
        images.append(TrainingImage(name, files[name], texts, repeats, _digest(name, files[name], problems)))
    refuse(source, problems, _REMEDY)
    if not images:
        raise ValueError(f"{source}: expected at least one image, got none; give the folder that holds them")
    own, home = {stem(name) for name in files}, place if place is not None and place.is_dir() else source
    unused = sorted(_named(file, home) for name, file in beside.items() if name not in own)
    return TrainingImages(source, tuple(images), tuple(unused))


def _named(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix() if file.is_relative_to(folder) else file.name


def _check(source: Path, captions: Path | None) -> None:
    """Refuse what is no source, or no place of captions, before anything is read."""
    require("audit", "training images")
    kinds = ", ".join(LISTINGS)
    if not source.is_dir() and (not source.is_file() or source.suffix.lower() not in LISTINGS):
        what = f"a file {source.suffix!r}" if source.is_file() else "nothing there"
        raise ValueError(
            f"{source}: expected a folder of images, or a file that lists them ({kinds}), got {what}; give the folder"
        )
    if captions is None:
        return
    if source.is_file():
        raise ValueError(
            f"captions: expected none where {source} lists the images, got {captions}; write them into that file, or"
            f" give the folder of the images"
        )
    if not captions.is_dir() and (not captions.is_file() or captions.suffix.lower() not in LISTINGS):
        what = f"a file {captions.suffix!r}" if captions.is_file() else "nothing there"
        raise ValueError(f"captions: expected a folder, or a file ({kinds}), got {what} at {captions}")


def _listings(
    source: Path, captions: Path | None, folder: Folder, problems: list[str]
) -> list[tuple[str, Path, tuple[Path, ...]]]:
    """The files that list images: the name of each, and the folders that its paths can be relative to."""
    if source.is_file():
        return [(source.name, source, (source.parent,))]
    if captions is not None:
        return [(captions.name, captions, (folder.path, captions.parent))] if captions.is_file() else []
    found: list[tuple[str, Path, tuple[Path, ...]]] = []
    places = Counter(file.parent for file in folder.metadata.values())
    for name, file in folder.metadata.items():
        if file.suffix.lower() not in LISTINGS:
            problems.append(f"{name}: expected metadata.csv or metadata.jsonl, got Parquet")
        elif places[file.parent] > 1:
            problems.append(f"{name}: expected one file of metadata in a folder, got {places[file.parent]}")
        else:
            found.append((name, file, (file.parent,)))
    return found


def _listed(
    listings: list[tuple[str, Path, tuple[Path, ...]]], folder: Folder, problems: list[str]
) -> dict[str, tuple[Path, list[tuple[str, ...]]]]:
    """The images that the files list, by name: where each lies, and the captions of each of its rows."""
    found: dict[str, tuple[Path, list[tuple[str, ...]]]] = {}
    for name, file, bases in listings:
        try:
            for row in read_listing(file, name):
                image = folder.find(row.path, bases)
                if image is None:
                    problems.append(f"{row.where}: a caption of {row.path!r}, which is not there")
                else:
                    found.setdefault(image[0], (image[1], []))[1].append(row.captions)
        except ValueError as error:
            problems.append(str(error))
    return found


def _of_folder(name: str) -> tuple[int, tuple[str, ...]]:
    """What kohya's name of an image's own folder says: repeats and, where it has words, the caption."""
    matched = _KOHYA.fullmatch(PurePosixPath(name).parent.name)
    if matched is None:
        return 1, ()
    words = matched[2].strip()
    return int(matched[1]), (words,) if words else ()


def _digest(name: str, file: Path, problems: list[str]) -> str:
    """The sum of a file's bytes, after they were decoded to the end."""
    try:
        content = file.read_bytes()
        decoded(content)
    except OSError as error:
        problems.append(f"{name}: {error.strerror}")
        return ""
    except ValueError as error:
        problems.append(f"{name}: {error}")
        return ""
    return hashlib.sha256(content).hexdigest()
