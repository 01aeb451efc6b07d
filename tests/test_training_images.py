"""Training images: every layout of folders, an outsider's folder by value, and all faults at once."""

import csv
import hashlib
import io
import json
import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from jaxmem.training_images import Preparation, TrainingImage, read_training_images
from jaxmem.training_images.images import TrainingImages
from jaxmem.training_images.preparation import covering, decoded

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(image, kind="PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def flat(color=RED, size=(4, 4), mode="RGB") -> Image.Image:
    return Image.new(mode, size, color)


def lay(root, files) -> None:
    """Write files of bytes, text (UTF-8) or images (PNG)."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = encoded(content) if isinstance(content, Image.Image) else content
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def captions(images: TrainingImages) -> dict[str, tuple[str, ...]]:
    return {image.name: image.captions for image in images.images}


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))


def halves() -> Image.Image:
    """A photo of 40 × 20: red on the left, blue on the right."""
    image = flat(RED, (40, 20))
    image.paste(BLUE, (20, 0, 40, 20))
    return image


@pytest.fixture
def outsider(tmp_path):
    """A folder as somebody sends it, but for the truncated PNG."""
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: upright after a quarter turn clockwise
    twice = encoded(flat(GREEN))
    cmyk = flat((0, 255, 255, 0), (8, 8), "CMYK")  # no cyan, full magenta and yellow: red
    lay(
        tmp_path,
        {
            "10_sks dog/one.jpg": encoded(cmyk, "JPEG", quality=100),
            "10_sks dog/one.txt": "ein Hündchen – ganz süß\n\nzweite Zeile\n".encode("cp1252"),
            "10_sks dog/photo.JPG": encoded(halves(), "JPEG", exif=exif, quality=100),
            "1_cat/dot.png": flat(BLUE, (1, 1)),
            "1_cat/dot.caption": "a dot",
            "1_cat/copy.png": twice,
            "plain/copy again.png": twice,
            "plain/README.txt": "Nothing of an image.",
            ".DS_Store": b"\0\0",
            "10_sks dog/Thumbs.db": b"\0\1",
            "10_sks dog/._one.jpg": b"\0\5",
            "__MACOSX/1_cat/dot.png": b"\0\5",
            "10_sks dog/one.npz": b"PK",
        },
    )
    return tmp_path


def test_an_outsiders_folder_is_right_by_value(outsider):
    found = read_training_images(str(outsider))
    assert [(image.name, image.captions, image.repeats) for image in found.images] == [
        ("10_sks dog/one.jpg", ("ein Hündchen – ganz süß", "zweite Zeile"), 10),
        ("10_sks dog/photo.JPG", ("sks dog",), 10),
        ("1_cat/copy.png", ("cat",), 1),
        ("1_cat/dot.png", ("a dot",), 1),
        ("plain/copy again.png", (), 1),
    ]
    assert len(found) == 5
    assert found.source == outsider
    for image in found.images:
        assert image.path == outsider / image.name
        assert image.sha256 == hashlib.sha256(image.path.read_bytes()).hexdigest()
    assert found.images[2].sha256 == found.images[4].sha256  # two names, one content, both kept
    pixels = found.pixels(4, 4)
    assert pixels.shape == (5, 4, 4, 3)
    assert pixels.dtype == np.uint8
    cmyk, photo, copy, dot, again = pixels.astype(int)
    assert np.abs(cmyk - RED).max() <= 3  # JPEG
    # Upright the photo is 20 wide and 40 high, red above blue; its middle is the border between them.
    assert np.abs(photo[0] - RED).max() < 40
    assert np.abs(photo[3] - BLUE).max() < 40
    assert np.array_equal(copy, again)
    assert (copy == GREEN).all()
    assert (dot == BLUE).all()


def test_a_truncated_png_is_named_and_nothing_else_comes(outsider):
    (outsider / "1_cat" / "half.png").write_bytes(encoded(noise())[:1500])
    with pytest.raises(
        ValueError, match=r"got 1 problem: 1_cat/half\.png: an image that is damaged, cut off or too large"
    ):
        read_training_images(outsider)


def test_all_problems_are_named_in_one_error(tmp_path):
    lay(
        tmp_path,
        {
            "fine.png": flat(),
            "a.jpg": encoded(noise(), "JPEG")[:-300],
            "b.png": "not an image",
            "c.webp": b"",
            "d.heic": b"\0\0\0\x18ftypheic",
            "e.png": flat(),
            "e.txt": "по-русски, словами".encode("cp1251"),
            "metadata.csv": "file_name,text\nfine.png,fine\nlost.png,a lost one\n../gone.jpg,gone\n",
            "sub/metadata.jsonl": '{"file_name": "x.png", "text": "x"}\n{"no": 1}\n',
            "sub/x.png": flat(),
            "other/metadata.parquet": b"PAR1",
        },
    )
    with pytest.raises(ValueError, match="problems") as caught:
        read_training_images(tmp_path)
    message = str(caught.value)
    assert message.startswith(
        f"{tmp_path}: expected images that can be read, and captions of them, got 9 problems: a.jpg:"
    )
    for part in (
        "a.jpg: an image that is damaged, cut off or too large (OSError: image file is truncated",
        "b.png: not an image that Pillow can read (it begins with b'not an i')",
        "c.webp: not an image that Pillow can read (it begins with b'')",
        "d.heic: not an image that Pillow can read",
        "caption of e.png, line 1: expected text in UTF-8, got byte 0xef",
        "metadata.csv, line 3: a caption of 'lost.png', which is not there",
        "metadata.csv, line 4: a caption of '../gone.jpg', which is not there",
        "sub/metadata.jsonl, line 2: expected a path in a column named file_name or",
        "other/metadata.parquet: expected metadata.csv or metadata.jsonl, got Parquet",
    ):
        assert part in message
    assert message.endswith("; mend these files, or take them and their captions away")
    assert "fine.png:" not in message


def test_after_ten_problems_comes_a_number(tmp_path):
    lay(tmp_path, {f"{number:02}.png": "x" for number in range(13)})
    with pytest.raises(ValueError, match=r"13 problems: 00\.png: .*09\.png: [^;]*; and 3 more; mend") as caught:
        read_training_images(tmp_path)
    assert "10.png" not in str(caught.value)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_of_folders_wins_over_files_and_names_of_folders(tmp_path, kind):
    rows = [("10_a b/1.png", "first"), ("2.png", "second"), ("2.png", "second, again")]
    if kind == "csv":
        stream = io.StringIO()
        csv.writer(stream).writerows([("file_name", "text"), *rows])
        text = stream.getvalue()
    else:
        text = "\n".join(json.dumps({"file_name": name, "text": caption}) for name, caption in rows)
    lay(
        tmp_path,
        {
            "10_a b/1.png": flat(),
            "2.png": flat(BLUE),
            "2.txt": "beside",
            "3.png": flat(WHITE),
            "3.txt": "third\n",
            "below/4.png": flat(GREEN),
            "below/metadata.jsonl": '{"file_name": "4.png", "text": ["one", "two"]}',
            f"metadata.{kind}": text,
        },
    )
    found = read_training_images(tmp_path)
    assert [(image.name, image.captions, image.repeats) for image in found.images] == [
        ("10_a b/1.png", ("first",), 1),
        ("2.png", ("second", "second, again"), 2),
        ("3.png", ("third",), 1),
        ("below/4.png", ("one", "two"), 1),
    ]


def test_two_files_of_metadata_in_a_folder_are_refused(tmp_path):
    lay(tmp_path, {"a.png": flat(), "metadata.csv": "file_name,text\na.png,x\n", "metadata.jsonl": ""})
    with pytest.raises(ValueError, match=r"metadata\.csv: expected one file of metadata in a folder, got 2"):
        read_training_images(tmp_path)


def test_json_of_captions_by_path(tmp_path):
    written = {
        "1.png": "one",
        "sub/2": ["two", "  ", "zwei"],  # kohya's keys have no ending
        str(tmp_path / "images" / "3.png"): {"caption": "a cat", "tags": "grey, small"},
        "4.png": {"tags": "only, tags"},
        "5.png": "",
    }
    names = ["1.png", "sub/2.png", "3.png", "4.png", "5.png", "6.png"]
    lay(tmp_path, {f"images/{name}": flat() for name in names} | {"meta.json": json.dumps(written)})
    found = captions(read_training_images(tmp_path / "images", captions=tmp_path / "meta.json"))
    assert found == {
        "1.png": ("one",),
        "sub/2.png": ("two", "zwei"),
        "3.png": ("a cat,grey, small",),
        "4.png": ("only, tags",),
        "5.png": (),
        "6.png": (),
    }


def test_a_table_of_paths_is_a_source(tmp_path):
    lay(tmp_path, {name: flat() for name in ("in/a.png", "in/b.png", "in/unlisted.png", "away/c.png")})
    (tmp_path / "in" / "b.txt").write_text("not read here")
    rows = f"prompt;Image;label\nein Bär;a.png;1\nzwei;.\\b.png;0\nthree;{tmp_path / 'away' / 'c.png'};\nvier;a.png;1\n"
    (tmp_path / "in" / "prompts.csv").write_bytes(rows.encode("cp1252"))
    found = read_training_images(tmp_path / "in" / "prompts.csv")
    assert [(image.name, image.captions, image.repeats) for image in found.images] == [
        ("a.png", ("ein Bär", "vier"), 2),
        ("away/c.png", ("three",), 1),
        ("b.png", ("zwei",), 1),
    ]
    lay(tmp_path, {"in/list.json": json.dumps([{"path": "a.png", "caption": "x"}]), "in/p.tsv": "file\ttext\nb.png\ty"})
    assert captions(read_training_images(tmp_path / "in" / "list.json")) == {"a.png": ("x",)}
    assert captions(read_training_images(tmp_path / "in" / "p.tsv")) == {"b.png": ("y",)}


def test_a_folder_of_captions_beside_the_one_of_images(tmp_path):
    lay(
        tmp_path,
        {"images/5_dog/a.png": flat(), "images/b.png": flat(), "words/5_dog/a.TXT": "x\ny", "words/b.txt": "z"},
    )
    found = read_training_images(tmp_path / "images", captions=tmp_path / "words")
    assert captions(found) == {"5_dog/a.png": ("x", "y"), "b.png": ("z",)}
    assert found.images[0].repeats == 5


@pytest.mark.parametrize(
    "content",
    [
        "süß".encode(),
        b"\xef\xbb\xbf" + "süß".encode(),
        "süß".encode("utf-16"),
        "süß".encode("cp1252"),
        "süß\r\n".encode(),
    ],
)
def test_encodings_of_captions(tmp_path, content):
    lay(tmp_path, {"a.png": flat(), "a.txt": content})
    assert captions(read_training_images(tmp_path)) == {"a.png": ("süß",)}


def test_text_of_another_alphabet_is_refused_not_misread(tmp_path):
    for number, content in enumerate(("кошка".encode("cp1251"), "ねこ".encode("shift-jis"), b"a\0b")):
        lay(tmp_path / str(number), {"a.png": flat(), "a.txt": content})
        with pytest.raises(ValueError, match=r"caption of a\.png.*: expected text in UTF-8"):
            read_training_images(tmp_path / str(number))


def test_kohyas_names_of_folders(tmp_path):
    names = ["3_a_b/1.png", "0_left out/2.png", "no number/3.png", "7_/4.png", "2_x/deeper/5.png"]
    lay(tmp_path, {name: flat() for name in names} | {"3_a_b/1.txt": " \n"})
    assert [(image.name, image.captions, image.repeats) for image in read_training_images(tmp_path).images] == [
        ("2_x/deeper/5.png", (), 1),
        ("3_a_b/1.png", ("a_b",), 3),
        ("7_/4.png", (), 7),
        ("no number/3.png", (), 1),
    ]
    assert captions(read_training_images(tmp_path / "3_a_b")) == {"1.png": ()}  # names below the folder given only


def test_txt_comes_before_caption(tmp_path):
    lay(tmp_path, {"a.png": flat(), "a.caption": "second", "a.txt": "first", "b.jpg": encoded(flat(), "JPEG")})
    assert captions(read_training_images(tmp_path)) == {"a.png": ("first",), "b.jpg": ()}


def test_composed_accents_and_links(tmp_path):
    name = unicodedata.normalize("NFD", "é.png")
    lay(
        tmp_path,
        {f"images/{name}": flat(), "images/metadata.csv": "file_name,text\né.png,x\n", "more/b.png": flat(BLUE)},
    )
    os.symlink(tmp_path / "more", tmp_path / "images" / "linked")
    os.symlink(tmp_path / "images", tmp_path / "more" / "back")
    assert captions(read_training_images(tmp_path / "images")) == {name: ("x",), "linked/b.png": ()}
    os.symlink(tmp_path / "gone.png", tmp_path / "more" / "gone.png")
    with pytest.raises(ValueError, match=r"1 problem: linked/gone\.png: No such file"):
        read_training_images(tmp_path / "images")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("missing", r"missing: expected a folder of images, or a file .*\.json, .*, got nothing there"),
        ("a.txt", r"a\.txt: expected a folder of images, .* got a file '\.txt'"),
        ("empty", r"empty: expected at least one image, got none"),
        ("p.csv", r"p\.csv, line 2: expected a path in a column named file_name or .*, got 'prompt', 'label'"),
        ("list.json", r"list\.json: expected JSON, captions by the paths of images, got '\{'"),
        ("number.json", r"number\.json: expected captions by the paths of images, got int"),
        ("odd.json", r"odd\.json, key 'a\.png': expected a caption, or a list of captions, got 3"),
        ("kohya.json", r"expected texts under the keys 'caption' and 'tags', got \{'caption': 1\}"),
        ("null.jsonl", r"null\.jsonl, line 1: expected a path in a column named .*, got None in it"),
    ],
)
def test_what_is_no_source(tmp_path, name, match):
    (tmp_path / "empty").mkdir()
    lay(
        tmp_path,
        {
            "a.txt": "a",
            "a.png": flat(),
            "p.csv": "prompt,label\na cat,1\n",
            "list.json": "{",
            "number.json": "3",
            "odd.json": '{"a.png": 3}',
            "kohya.json": '{"a.png": {"caption": 1}}',
            "null.jsonl": '{"file_name": null}',
        },
    )
    with pytest.raises(ValueError, match=match):
        read_training_images(tmp_path / name)


def test_what_is_no_place_of_captions(tmp_path):
    lay(tmp_path, {"a.png": flat(), "p.csv": "path,text\na.png,x\n", "c.txt": "x"})
    with pytest.raises(ValueError, match=r"captions: expected none where .*p\.csv lists the images"):
        read_training_images(tmp_path / "p.csv", captions=tmp_path)
    with pytest.raises(ValueError, match=r"captions: expected a folder, or a file .*, got a file '\.txt' at"):
        read_training_images(tmp_path, captions=tmp_path / "c.txt")
    with pytest.raises(ValueError, match=r"captions: expected a folder, or a file .*, got nothing there at"):
        read_training_images(tmp_path, captions=tmp_path / "none.json")


def values(image: Image.Image, kind="PNG", **options) -> np.ndarray:
    return np.asarray(decoded(encoded(image, kind, **options)))


def test_any_mode_becomes_what_convert_rgb_makes_of_it():
    grey = np.array([[7, 300], [255, 65535]], np.uint16)
    assert values(Image.fromarray(grey))[..., 0].tolist() == [[7, 255], [255, 255]]  # as the scripts have it
    assert (values(flat((10, 20, 30, 0), mode="RGBA")) == (10, 20, 30)).all()  # not composited
    assert (values(flat((10, 128), mode="LA")) == 10).all()
    assert (values(flat(200, mode="L")) == 200).all()
    assert (values(flat(1, mode="1")) == 255).all()
    palette = flat(0, mode="P")
    palette.putpalette([9, 8, 7, 1, 2, 3])
    assert (values(palette, transparency=b"\x00\xff") == (9, 8, 7)).all()
    frames = [flat(RED), flat(BLUE)]
    assert (values(frames[0], "GIF", save_all=True, append_images=frames[1:]) == RED).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientations_against_numpy(orientation):
    image = np.random.default_rng(0).integers(0, 256, (2, 3, 3), np.uint8)
    turns = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, 1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(values(Image.fromarray(image), exif=exif), turns[orientation](image))


def test_large_images_are_read_without_a_warning_and_bombs_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    lay(tmp_path, {"a.png": flat(size=(12, 12))})
    assert read_training_images(tmp_path).pixels(12, 12).shape == (1, 12, 12, 3)
    lay(tmp_path, {"b.png": flat(size=(20, 20))})
    with pytest.raises(
        ValueError, match=r"b\.png: an image that is damaged, cut off or too large \(DecompressionBombError"
    ):
        read_training_images(tmp_path)


def read_one(tmp_path, array: np.ndarray) -> TrainingImages:
    lay(tmp_path, {"a.png": Image.fromarray(array)})
    return read_training_images(tmp_path)


def test_the_shorter_side_is_resized_and_the_middle_cut_out(tmp_path):
    image = np.random.default_rng(1).integers(0, 256, (4, 12, 3), np.uint8)
    blocks = image.reshape(2, 2, 6, 2, 3).mean((1, 3))  # 6 × 2 pixels
    found = read_one(tmp_path, image).pixels(2, 2, Preparation(interpolation="box"))
    np.testing.assert_allclose(found[0], blocks[:, 2:4], atol=1 + 1e-9)  # rounded to whole greys, twice
    tall = read_one(tmp_path, image.transpose(1, 0, 2)).pixels(2, 2, Preparation(interpolation="box"))
    np.testing.assert_array_equal(tall[0], found[0].transpose(1, 0, 2))


def test_stretched_and_as_it_is(tmp_path):
    image = np.random.default_rng(1).integers(0, 256, (5, 8, 3), np.uint8)
    images = read_one(tmp_path, image)
    stretched = images.pixels(5, 4, Preparation(resize="stretch", interpolation="box"))
    np.testing.assert_allclose(stretched[0], image.reshape(5, 4, 2, 3).mean(2), atol=0.5 + 1e-9)
    # Halves are rounded to even as in torchvision's CenterCrop: round(0.5) = 0, round(1.5) = 2.
    np.testing.assert_array_equal(images.pixels(4, 5, Preparation(resize="none"))[0], image[0:4, 2:7])
    np.testing.assert_array_equal(images.pixels(5, 8, Preparation(resize="none", crop="none"))[0], image)
    np.testing.assert_array_equal(
        images.pixels(10, 16, Preparation(interpolation="nearest"))[0], image.repeat(2, 0).repeat(2, 1)
    )


def test_sizes_are_those_of_torchvisions_resize():
    rng = np.random.default_rng(0)
    for width, height, to in rng.integers(1, 3000, (300, 3)).tolist():
        short, long = sorted((width, height))
        expected = (to, int(to * long / short))
        assert sorted(covering(width, height, to, to)) == sorted(expected)
        model = int(rng.integers(1, 1000))
        found = covering(width, height, to, model)
        assert found[0] >= to
        assert found[1] >= model
        assert to in found or model in found


def test_images_that_do_not_fit_are_all_named(tmp_path):
    lay(
        tmp_path,
        {
            "a.png": flat(size=(4, 4)),
            "b.png": flat(size=(9, 8)),
            "c.png": flat(size=(8, 8)),
            "d.png": flat(size=(1, 10**6)),
        },
    )
    images = read_training_images(tmp_path)
    with pytest.raises(ValueError, match=r"2 problems: a\.png: 4 × 4 pixels where the model has 8 × 8; d\.png"):
        images.pixels(8, 8, Preparation(resize="none"))
    with pytest.raises(ValueError, match=r"3 problems: .*b\.png: 9 × 8 pixels"):
        images.pixels(8, 8, Preparation(resize="none", crop="none"))
    with pytest.raises(ValueError, match=r"1 problem: d\.png: 1 × 1000000 pixels, too long and narrow"):
        images.pixels(512, 512)
    with pytest.raises(ValueError, match="height and width: expected at least 1 pixel each, got 0 and 8"):
        images.pixels(0, 8)


def test_captions_without_an_image_are_named(tmp_path):
    lay(tmp_path, {"a.png": flat(), "a.txt": "x", "b.txt": "y", "z/c.caption": "z", "z/d.png": flat(BLUE)})
    assert read_training_images(tmp_path).unused == ("b.txt", "z/c.caption")
    lay(tmp_path, {"0_left out/e.png": flat(GREEN), "0_left out/e.txt": "left out on purpose"})
    assert read_training_images(tmp_path).unused == ("b.txt", "z/c.caption")
    lay(tmp_path.parent / "list", {"all.json": '{"a.png": "x"}'})
    assert read_training_images(tmp_path, captions=tmp_path.parent / "list/all.json").unused[-1] == "z/c.caption"
    lay(tmp_path, {"captions/z/d.txt": "x", "captions/e.txt": "y"})
    assert read_training_images(tmp_path / "z", captions=tmp_path / "captions/z").unused == ()
    assert read_training_images(tmp_path / "z", captions=tmp_path / "captions").unused == ("e.txt", "z/d.txt")


def test_images_are_read_in_blocks_that_make_all_of_them(tmp_path):
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)) for _ in range(70)]
    lay(tmp_path, {f"{number:02d}.png": picture for number, picture in enumerate(pictures)})
    images = read_training_images(tmp_path)
    blocks = list(images.blocks(4, 4))
    assert [len(block) for block in blocks] == [64, 6]
    np.testing.assert_array_equal(np.concatenate(blocks), np.stack([np.asarray(picture) for picture in pictures]))
    np.testing.assert_array_equal(np.concatenate(blocks), images.pixels(4, 4))
    lay(tmp_path, {"03.png": flat(size=(5, 4)), "68.png": flat(size=(5, 4))})
    again = read_training_images(tmp_path).blocks(4, 4, Preparation(resize="none", crop="none"))
    with pytest.raises(ValueError, match=r"2 problems: 03\.png: 5 × 4 .*; 68\.png: 5 × 4"):  # of all blocks at once
        next(again)


def test_a_file_that_changed_is_named(tmp_path):
    lay(tmp_path, {"a.png": flat(), "b.png": flat(), "c.png": flat()})
    images = read_training_images(tmp_path)
    lay(tmp_path, {"a.png": flat(BLUE)})
    (tmp_path / "b.png").unlink()
    with pytest.raises(ValueError, match=r"2 problems: a\.png: another content than .*; b\.png: No such file"):
        images.pixels(4, 4)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["resize", "crop", "interpolation"])
def test_unknown_preparations_are_refused(name):
    with pytest.raises(ValueError, match=rf"{name}: expected one of .*, got 'random'"):
        Preparation(**{name: "random"})


def test_the_defaults_are_those_of_diffusers_scripts():
    assert Preparation() == Preparation("shorter", "center", "lanczos")
    assert TrainingImage._fields == ("name", "path", "captions", "repeats", "sha256")
