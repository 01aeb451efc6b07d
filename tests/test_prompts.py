"""Files of prompts: every kind, labels and categories, and one clear error for each thing that can be wrong."""

import csv
import gzip
import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import command_environment

from jaxmem.prompts import Prompt, as_cell, as_prompts, from_cell, gather, merge, read_prompts

REAL = Path(os.environ.get("JAXMEM_PROMPT_LISTS", Path(__file__).parents[2] / "shared/data/prompts"))


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_text_files_have_one_prompt_a_line(tmp_path):
    path = written(tmp_path, "p.txt", '\ufeffa cat\r\n\r\n  <script>alert(1)</script> \nüber, alles; "quoted"\n')
    assert read_prompts(path) == [
        Prompt("a cat"), Prompt("<script>alert(1)</script>"), Prompt('über, alles; "quoted"')
    ]  # fmt: skip
    assert read_prompts(path, limit=1) == [Prompt("a cat")]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_tables_with_any_separator(tmp_path, separator):
    rows = [
        ("", "Caption", "URL", "type", "Memorized"),
        ("0", f'"one{separator} ""two"""', "x", "VM", "1"),
        ("1", '"over\ntwo lines"', "x", "", "No"),
        ("2", "plain", "x", "TM", ""),
    ]
    path = written(tmp_path, "p.csv", "\n".join(separator.join(row) for row in rows) + "\n\n")
    assert read_prompts(path) == [
        Prompt(f'one{separator} "two"', True, "VM"), Prompt("over\ntwo lines", False), Prompt("plain", None, "TM")
    ]  # fmt: skip


def test_labels_as_pandas_writes_them_and_lines_of_old_macs(tmp_path):
    path = written(tmp_path, "p.csv", "prompt,label\na,1.0\nb,0.0\nc,\n")
    assert [prompt.label for prompt in read_prompts(path)] == [True, False, None]
    assert [prompt.text for prompt in read_prompts(written(tmp_path, "p.txt", "a\rb\r\nc\n"))] == ["a", "b", "c"]


def test_a_table_of_one_column(tmp_path):
    assert read_prompts(written(tmp_path, "p.CSV", "PROMPT\na cat\na dog")) == [Prompt("a cat"), Prompt("a dog")]
    assert read_prompts(written(tmp_path, "p.tsv", "text\tlabel\na\ttrue\n")) == [Prompt("a", True)]


def test_json_lines(tmp_path):
    rows = [
        {"prompt": "a", "label": True, "category": "VM"},
        {"Text": "b", "label": 0},
        {"caption": "c", "label": None, "other": [1]},
        {"prompt": "d", "label": 1.0, "category": 3},
    ]
    path = written(tmp_path, "p.jsonl", "\n\n".join(map(json.dumps, rows)))
    assert read_prompts(path) == [
        Prompt("a", True, "VM"), Prompt("b", False), Prompt("c"), Prompt("d", True, "3")
    ]  # fmt: skip


def test_a_very_long_prompt_is_legal(tmp_path):
    assert len(read_prompts(written(tmp_path, "p.csv", "prompt\n" + "x" * 100_000 + "\n"))[0].text) == 100_000


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("p.txt", "", r"p\.txt: expected at least one prompt, got an empty file"),
        ("p.txt", " \n\n", "expected at least one prompt"),
        ("p.csv", "", "expected at least one prompt"),
        ("p.csv", "prompt,label\n", "expected at least one prompt"),
        ("p.jsonl", "\n", "expected at least one prompt"),
        ("p.md", "a", r"named \.txt, \.csv, \.tsv, \.json, \.jsonl \(or .* \.gz\) or \.parquet, got '\.md'"),
        ("p", "a", r"a file of prompts named .*, got ''"),
        ("p.md.gz", "a", r"a file of prompts named .*, got '\.md\.gz'"),
        ("p.gz", "a", r"a file of prompts named .*, got '\.gz'"),
        ("p.parquet.gz", "a", r"a file of prompts named .*, got '\.parquet\.gz'"),
        ("p.txt.gz", b"a cat", r"p\.txt\.gz: expected a file compressed by gzip, got a damaged one"),
        ("p.txt.gz", gzip.compress(b"a cat" * 99, mtime=0)[:-9], r"compressed by gzip, got a damaged one"),
        ("p.txt.gz", gzip.compress(b"", mtime=0), r"expected at least one prompt, got an empty file"),
        ("p.txt", b"\xff\xfea", r"p\.txt: expected text in UTF-16, as its first bytes say, got "),
        ("p.txt", b"\x89PNG\r\n\x1a\n\0\0", r"got zero bytes, as UTF-16 and files that are no text have them"),
        ("p.json", "", r"expected at least one prompt, got an empty file"),
        ("p.json", "[]", r"expected at least one prompt, got an empty file"),
        (
            "p.json",
            '["a", ',
            r"p\.json: expected JSON, a list of prompts, got '\[\"a\", ' .*with one object per line \.jsonl",
        ),
        ("p.json", '"a"', r"p\.json: expected a list of prompts, got str"),
        ("p.json", '["a", 3]', r"p\.json, prompt 2: expected a JSON object, got int"),
        ("p.json", '["a", ""]', r"prompt 2: expected a prompt, got ''"),
        ("p.json", '{"words": ["a"]}', r"expected a list, or a key named .*, got the keys 'words'"),
        ("p.json", '{"prompt": "a"}', r"expected a list under the key 'prompt', got 'a'"),
        ("p.json", '{"prompt": ["a", "b"], "label": [1]}', r"columns of one length, got 2 of 'prompt', 1 of 'label'"),
        (
            "p.json",
            '{"prompt": {"0": "a", "1": "b"}, "label": {"1": 1, "2": 0}}',
            r"expected one index of all columns, got '0', '2' not in 'label' or only there",
        ),
        ("p.json", '["a\\u0000"]', r"prompt 1: expected text, got a zero character"),
        ("p.txt", b"ok\na\xe9b\n", r"p\.txt, line 2: expected text in UTF-8, got byte 0xe9 at position 4"),
        ("p.txt", b"\xef\xbb\xbfok\n\xff", r"line 2: expected text in UTF-8, got byte 0xff at position 6"),
        ("p.txt", "a cat\n".encode("utf-16-le"), "expected text in UTF-8, got zero bytes"),
        ("p.csv", "id;url\n1;x\n", r"a column named prompt or caption or text, got the columns 'id', 'url'"),
        ("p.csv", "prompt,label\na,1\nb,maybe\n", r"line 3: expected a label 1 or 0, .* got 'maybe'"),
        ("p.csv", "prompt,label\na,1\n,0\n", r"line 3: expected a prompt, got ''"),
        ("p.csv", 'prompt,label\n"a\nb",1\nc,d,e\n', r"line 4: expected 2 columns as in the header, got 3; quote"),
        ("p.csv", 'prompt,label\n"a"b,1\n', r"line 2: expected CSV, got a damaged row"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', r"line 2: expected a JSON object, got '\{\"prompt\": "),
        ("p.jsonl", "[1]\n", r"line 1: expected a JSON object, got list"),
        (
            "p.jsonl",
            '{"words": "a"}\n',
            r"line 1: expected a key named prompt or caption or text, got the keys 'words'",
        ),
        ("p.jsonl", '{"prompt": 3}\n', r"line 1: expected a prompt, got 3"),
        ("p.jsonl", '{"prompt": "a", "label": 2}\n', r"line 1: expected a label .*, got 2"),
        ("p.jsonl", '{"prompt": "\\ud800"}\n', r"line 1: expected text, got half a surrogate pair"),
        ("p.jsonl", "[" * 100_000, r"line 1: expected a JSON object"),
        ("p.txt", "a\nb\na\nb\n", r"got line 3 equal to line 1 \('a'\) and 1 more duplicates; delete them, or merge"),
        ("p.csv", "prompt,label\na,1\na,0\n", r"one label and category per prompt, got \(True, None\) in line 2 and"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, name, content, match):
    with pytest.raises(ValueError, match=match):
        read_prompts(written(tmp_path, name, content))


def test_missing_files_and_limits(tmp_path):
    with pytest.raises(ValueError, match=r"none\.txt: expected a file of prompts, got no such file"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="limit: expected at least 1 prompt, got 0"):
        read_prompts(written(tmp_path, "p.txt", "a"), limit=0)


def test_duplicates_are_merged_when_asked(tmp_path):
    path = written(tmp_path, "p.txt", "a\nb\na\n")
    assert read_prompts(path, merge_duplicates=True) == [Prompt("a"), Prompt("b")]
    conflict = [("line 1", Prompt("a", True)), ("line 2", Prompt("a", False))]
    with pytest.raises(ValueError, match=r"got \(True, None\) in line 1 and \(False, None\) in line 2 for 'a'"):
        merge(conflict, "p", merge_duplicates=True)


def test_files_together(tmp_path):
    table = written(tmp_path, "a.csv", "prompt,label\na,\nb,0\n")
    text = written(tmp_path, "b.txt", "c\nd\n")
    assert gather([([text], None), ([table], True)]) == [
        Prompt("c"),
        Prompt("d"),
        Prompt("a", True),
        Prompt("b", False),
    ]
    assert gather([([text, table], None)], limit=1) == [Prompt("c"), Prompt("a")]
    with pytest.raises(
        ValueError, match=r"each prompt once, got prompt 1 of .*c\.txt equal to prompt 2 of .*b\.txt \('d'\)"
    ):
        gather([([text, written(tmp_path, "c.txt", "d\n")], None)])


def test_one_file_under_both_labels_is_refused(tmp_path):
    path = written(tmp_path, "p.txt", "a\nb\n")
    with pytest.raises(ValueError, match=r"expected one label and category per prompt, got \(True, None\)"):
        gather([([path], True), ([path], False)])


# --- Quotes in tables -------------------------------------------------------------------------------------------------

STRAY = [  # rows whose quotes are part of the text, at least one of them stray
    [('"Red car', "u"), ('Blue car"', "u"), ("a dog", "u")],
    [('"Red car', "u"), ("a dog", "u"), ('Blue car"', "u")],
    [('"Red car', "u"), ("a dog", "u"), ("a cat", "u")],
    [("a dog", "u"), ("a cat", "u"), ('"Red car', "u")],
    [("a dog", '"u'), ("a cat", 'u"'), ('"Red" car', "u")],
    [('12" screen', "u"), ('"Red" car', "u"), ('""Blue car', "u")],
]


@pytest.mark.parametrize("rows", STRAY, ids=str)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_stray_quotes_between_tabs_are_text_and_join_no_rows(tmp_path, rows, end):
    path = written(tmp_path, "p.tsv", end.join("\t".join(row) for row in [("caption", "url"), *rows]))
    assert [prompt.text for prompt in read_prompts(path)] == [text for text, _ in rows]


def test_tables_with_tabs_as_pandas_writes_them(tmp_path):
    texts = ['say "hi"', "over\ntwo lines", 'with\ttab and "quotes"', "plain", '"all"']
    for columns in ({"caption": texts, "url": list("abcde")}, {"url": list("abcde"), "caption": texts}):
        pd.DataFrame(columns).to_csv(tmp_path / "p.tsv", sep="\t", index=False)
        assert [prompt.text for prompt in read_prompts(tmp_path / "p.tsv")] == texts


@pytest.mark.parametrize("separator", [",", ";", "|", "\t"])
def test_every_table_that_a_writer_of_csv_makes_is_read_as_pandas_reads_it(tmp_path, separator):
    pieces = ["a", '"', "\n", "\r\n", " b", separator]
    texts = {"x" + "".join(some) + "y" for n in range(4) for some in itertools.product(pieces, repeat=n)}
    if separator == "\t":  # where each line of a cell has as many tabs as a row, it is read as rows: no caption has
        texts = {text for text in texts if "\n" not in text or "\t" not in text}
    rows = [(text, "u v", n % 2) for n, text in enumerate(sorted(texts))]
    path, refused = tmp_path / "p.csv", 0
    for first in range(0, len(rows), 7):  # small files, so that one refusal hides little
        part = rows[first : first + 7]
        stream = io.StringIO(newline="")
        csv.writer(stream, delimiter=separator, lineterminator="\n").writerows([("caption", "url", "label"), *part])
        path.write_bytes(stream.getvalue().encode())
        try:
            found = [prompt.text for prompt in read_prompts(path)]
        except ValueError as error:
            assert "are rows by themselves" in str(error)  # noqa: PT017
            refused += 1
            continue
        assert found == pd.read_csv(path, sep=separator).caption.tolist() == [text for text, *_ in part]
    assert refused <= 2, "a cell over two lines, each with as many separators as the header"


def test_a_quote_that_joins_whole_rows_is_refused(tmp_path):
    rows = ['"Red car,u', *(f"car {n},u" for n in range(50)), 'Blue car",u']
    with pytest.raises(ValueError, match=r"line 2: .*opens in this line and closes in line 53, though 52 of these"):
        read_prompts(written(tmp_path, "p.csv", "\n".join(["caption,url", *rows])))
    with pytest.raises(ValueError, match=r"line 2: .*opens in this line and closes in line 3, though 2 of these"):
        read_prompts(written(tmp_path, "p.tsv", 'caption\n"Red car\nBlue car"\n'))
    # prose goes on after its comma with a space, so this can only be one prompt
    path = written(tmp_path, "p.csv", 'caption,url\n"a cat, red\nand a dog",u\n')
    assert read_prompts(path) == [Prompt("a cat, red\nand a dog")]
    assert read_prompts(written(tmp_path, "p.csv", 'caption\n"a\nb"\n')) == [Prompt("a\nb")]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("p.csv", 'caption,url\na,u\n"Red car,u\nb,u\n', r"line 3: expected CSV, got a quote that is never closed"),
        ("p.csv", 'caption,url\n"Red car,u\nb,u\na "big" cat,u\n', r"line 2: .*before the end of its cell of line 4"),
        ("p.tsv", 'caption\turl\n"Red car\nb\tu\n', r"line 2: expected CSV, got a quote that is never closed"),
        ("p.tsv", "caption\turl\na\tu\nb\n", r"line 3: expected 2 columns as in the header, got 1"),
        ("p.csv", 'caption\n"' + "x" * 200_000 + '"\n', r"line 2: expected CSV, got a damaged row \(field larger"),
    ],
)
def test_quotes_that_do_not_close_are_named(tmp_path, name, content, match):
    with pytest.raises(ValueError, match=match):
        read_prompts(written(tmp_path, name, content))


def test_line_breaks_of_unicode_end_no_row(tmp_path):
    assert read_prompts(written(tmp_path, "p.csv", "pro\u2028mpt,caption\na,b\u2028c\x0bd\n")) == [
        Prompt("b\u2028c\x0bd")
    ]


# --- More kinds of files ----------------------------------------------------------------------------------------------

THREE = [Prompt("a cat", True), Prompt("a dog", False), Prompt("über alles")]
AS_JSON = [
    [{"prompt": "a cat", "label": 1}, {"caption": "a dog", "memorized": "no"}, {"text": "über alles"}],
    {"Prompt": ["a cat", "a dog", "über alles"], "label": [True, 0, None]},
    {"text": {"0": "a cat", "7": "a dog", "8": "über alles"}, "label": {"0": "mem", "7": "nonmem", "8": float("nan")}},
]


@pytest.mark.parametrize("value", AS_JSON, ids=["objects", "columns", "columns with an index"])
def test_json(tmp_path, value):
    assert read_prompts(written(tmp_path, "p.json", json.dumps(value))) == THREE


def test_json_of_texts_and_as_pandas_writes_it(tmp_path):
    expected = [prompt._replace(label=None) for prompt in THREE]
    texts = [prompt.text for prompt in THREE]
    assert read_prompts(written(tmp_path, "p.json", json.dumps(texts))) == expected
    assert read_prompts(written(tmp_path, "p.jsonl", "\n".join(map(json.dumps, texts)))) == expected
    frame = pd.DataFrame({"caption": texts, "memorized": [1, 0, None]})
    for name, options in {
        "a.json": {},
        "b.json": {"orient": "records"},
        "c.jsonl": {"orient": "records", "lines": True},
    }.items():
        frame.to_json(tmp_path / name, **options)
        assert read_prompts(tmp_path / name) == THREE, name


def test_parquet(tmp_path):
    pytest.importorskip("pyarrow", reason="pandas needs pyarrow for Parquet files")
    frame = pd.DataFrame({"Caption": [prompt.text for prompt in THREE], "url": 1.5, "label": [True, False, None]})
    for label in (frame.label, frame.label.astype("boolean"), frame.label.astype(float), pd.Series(["mem", "no", ""])):
        frame.assign(label=label).to_parquet(tmp_path / "p.parquet")
        assert read_prompts(tmp_path / "p.parquet") == THREE
    frame.assign(Caption=["a", None, "b"]).to_parquet(tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=r"p\.parquet, row 2: expected a prompt, got None"):
        read_prompts(tmp_path / "p.parquet")
    frame[["url"]].to_parquet(tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=r"p\.parquet: expected a column named .*, got the columns 'url'"):
        read_prompts(tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=r"expected a Parquet file, got one that pandas cannot read"):
        read_prompts(written(tmp_path, "p.parquet", "a cat"))


@pytest.mark.parametrize("missing", ["pandas", "pyarrow"])
def test_parquet_without_what_reads_it(tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, "pandas", None)
    if missing == "pyarrow":

        def read_parquet(path):
            raise ImportError("Unable to find a usable engine")

        monkeypatch.setitem(sys.modules, "pandas", type(sys)("pandas"))
        sys.modules["pandas"].read_parquet = read_parquet
    with pytest.raises(ImportError, match=r"p\.parquet: expected pandas with pyarrow.*; pip install 'jaxmem\[all\]'"):
        read_prompts(written(tmp_path, "p.parquet", "a cat"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "a cat\na dog\nüber alles\n"),
        ("p.csv", "prompt;url\na cat;u\na dog;u\nüber alles;u\n"),
        ("p.tsv", "prompt\turl\na cat\tu\na dog\tu\nüber alles\tu\n"),
        ("p.json", '["a cat", "a dog", "über alles"]'),
        ("p.jsonl", '"a cat"\n"a dog"\n{"text": "über alles"}\n'),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])  # the last two begin with a byte order mark
@pytest.mark.parametrize("packed", [False, True])
def test_encodings_line_ends_and_gzip_of_every_text_file(tmp_path, name, content, end, encoding, packed):
    raw = content.replace("\n", end).encode(encoding)
    path = written(tmp_path, name + (".GZ" if packed else ""), gzip.compress(raw, mtime=0) if packed else raw)
    assert read_prompts(path) == [prompt._replace(label=None) for prompt in THREE]


def test_a_folder_has_one_caption_per_file(tmp_path):
    for name, caption in {"2.txt": "a dog\n", "10.TXT": "\n a cat ", "3.txt": "", "._3.txt": "x", "3.png": "x"}.items():
        written(tmp_path, name, caption)
    assert read_prompts(tmp_path) == [Prompt("a cat"), Prompt("a dog")]
    with pytest.raises(ValueError, match=r"expected each prompt once, got b\.txt equal to 10\.TXT"):
        read_prompts(written(tmp_path, "b.txt", "a cat").parent)
    assert read_prompts(tmp_path, merge_duplicates=True) == [Prompt("a cat"), Prompt("a dog")]
    written(tmp_path, "c.txt", "one\ntwo\n")
    with pytest.raises(ValueError, match=r"c\.txt: expected one caption per file of a folder, got 2 lines"):
        read_prompts(tmp_path)


def test_folders_without_captions(tmp_path):
    with pytest.raises(ValueError, match=r"one caption per \.txt file, got none of these in it; .*metadata\.jsonl"):
        read_prompts(tmp_path)
    written(tmp_path, "a.txt", " \n")
    with pytest.raises(ValueError, match="expected at least one prompt, got a folder of empty captions"):
        read_prompts(tmp_path)
    (tmp_path / "d.txt").mkdir()
    written(tmp_path / "d.txt", "a.txt", "a cat")
    assert read_prompts(tmp_path / "d.txt") == [Prompt("a cat")]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a cat\n[a] dog\n", [Prompt("a cat"), Prompt("[a] dog")]),
        ("[a] cat\na dog, and a caption\n", [Prompt("[a] cat"), Prompt("a dog, and a caption")]),
        ("a poster, text\na cat\n", [Prompt("a poster, text"), Prompt("a cat")]),
        ("prompt,label\na cat,1\n", [Prompt("a cat", True)]),
        ('"Caption"\turl\n"Red\tu\n', [Prompt('"Red')]),
        ("text\na cat\n", [Prompt("a cat")]),
        ('{"prompt": "a cat"}\n{"prompt": "a dog"}\n', [Prompt("a cat"), Prompt("a dog")]),
        ('["a cat"]\n', [Prompt("a cat")]),
        ('[\n{"prompt": "a cat"}\n]', [Prompt("a cat")]),
        ('{\n"prompt": ["a cat"]}\n', [Prompt("a cat")]),
        ('{"prompt": {"1": "b", "0": "a"}, "label": {"0": 1, "1": 0}}\n', [Prompt("b", False), Prompt("a", True)]),
    ],
)
def test_standard_input(monkeypatch, content, expected):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    assert gather([(["-"], None)]) == expected


def test_standard_input_that_is_empty_or_named_twice(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(ValueError, match="standard input: expected at least one prompt, got an empty file"):
        read_prompts("-")
    with pytest.raises(ValueError, match=r"expected standard input \(-\) once, got it several times"):
        gather([(["-"], True), (["-"], False)])


def test_standard_input_through_the_command_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "jaxmem", "audit", "nowhere/x", "--prompts", "-", "--out", str(tmp_path / "run")],
        env=command_environment(), input=b"a cat\na cat\n", capture_output=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert b"standard input: expected each prompt once, got line 2 equal to line 1" in done.stderr


# --- Labels and prompts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "expected", "category"),
    [
        *((word, True, None) for word in ("1", "1.0", "TRUE", "Yes", "y", " Memorized ", "memorised", "mem")),
        *((word, False, None) for word in ("0", "0.0", "False", "no", "n", "not memorized", "not_memorized")),
        *((word, False, None) for word in ("Not-Memorised", "unmemorized", "un-memorized", "non-memorized", "nonmem")),
        *((word, False, None) for word in ("unmem", "not mem", "None", "general")),
        *((word, True, word) for word in ("matching", "Matching verbatim", "template_verbatim", "VM", "TM", "MV")),
        *((word, None, None) for word in ("", "NaN", "NA", "n/a", "null", "unknown")),
    ],
)
def test_labels_in_the_words_people_use(tmp_path, label, expected, category):
    path = written(tmp_path, "p.csv", f"prompt,label\na,{label}\nb,1\n")
    assert read_prompts(path)[0] == Prompt("a", expected, category)
    path = written(tmp_path, "p.jsonl", json.dumps({"prompt": "a", "label": label, "category": "mine"}))
    assert read_prompts(path) == [Prompt("a", expected, "mine")]


@pytest.mark.parametrize("label", ["2", "-1", "maybe", "0.5", "memorizedd", "[]"])
def test_other_labels_are_refused_by_listing_these(tmp_path, label):
    with pytest.raises(ValueError, match=r"expected a label 1 or 0, .*yes.*matching.*unmemorized.*nothing\), got '"):
        read_prompts(written(tmp_path, "p.csv", f"prompt,label\na,{label}\n"))


def test_texts_and_prompts_become_prompts():
    assert as_prompts(["a cat", Prompt("a dog", True, "VM")]) == [Prompt("a cat"), Prompt("a dog", True, "VM")]
    assert as_prompts(np.array(["a", "b"])) == as_prompts(pd.Series(["a", "b"])) == [Prompt("a"), Prompt("b")]
    assert as_prompts(text for text in ("a", "b")) == [Prompt("a"), Prompt("b")]


@pytest.mark.parametrize(
    ("items", "match"),
    [
        ("a cat", r"prompts: expected a list of texts or of Prompt objects, got 'a cat'; write \['a cat'\], or read"),
        (Path("p.csv"), r"prompts: expected a list .*; write .*, or read a file with jaxmem\.prompts\.read_prompts"),
        (3, r"prompts: expected a list of texts or of Prompt objects, got 3"),
        (["a", 3], r"prompts\[1\]: expected a text, or Prompt\(text, label, category\).*, got 3"),
        ([("a", True)], r"prompts\[0\]: expected a text, or Prompt.*, got \('a', True\)"),
        ([{"prompt": "a"}], r"prompts\[0\]: expected a text, or Prompt"),
        ([Prompt("a", 1)], r"a label True, False or None, got Prompt\(text='a', label=1"),
        (["a\0"], r"prompts\[0\]: expected text, got a zero character"),
        (["\ud800"], r"prompts\[0\]: expected text, got half a surrogate pair"),
    ],
)
def test_what_is_no_list_of_prompts_is_said(items, match):
    with pytest.raises(ValueError, match=match):
        as_prompts(items)


def test_cells_begin_with_no_formula_and_give_the_text_back():
    signs = "=+-@＝＋－＠\t\r\n"
    dangerous = [*signs, *(before + sign + "1+1" for sign in signs for before in ("", " ", "'", "''", "' "))]
    for text in (*dangerous, "", "a cat", "'quoted'", "a=b", "'", "1-2", "#", "é"):
        cell = as_cell(text)
        assert cell.strip(" ")[:1] not in tuple(signs)
        assert from_cell(cell) == text
        assert as_cell(cell) == cell or from_cell(as_cell(cell)) == cell
    assert as_cell("a cat") == "a cat"


def test_large_tables_take_seconds(tmp_path):
    rows = "".join(f'a "big" car {n}\tu\n"open {n}\tu\n' for n in range(10_000))
    assert len(read_prompts(written(tmp_path, "p.tsv", "caption\turl\n" + rows))) == 20_000


@pytest.mark.skipif(
    not REAL.is_dir(), reason="the real prompt lists are not there (JAXMEM_PROMPT_LISTS); they are not ours to ship"
)
def test_the_real_lists():
    memorized = gather([([REAL / "memorized_laion_prompts.csv"], True)])
    others = gather([([REAL / "unmemorized_laion_prompts.csv"], False)])
    assert [len(memorized), len(others)] == [500, 500]
    assert all(prompt.label for prompt in memorized)
    assert sum(prompt.category == "VM" for prompt in memorized) == 112
    assert sum(prompt.category == "TM" for prompt in memorized) == 388
    assert {prompt[1:] for prompt in others} == {(False, None)}
