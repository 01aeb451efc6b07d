"""Files of prompts: the three kinds, labels and categories, and one clear error for each thing that can be wrong."""

import json
import os
from pathlib import Path

import pytest

from jaxmem.prompts import Prompt, gather, merge, read_prompts

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
        ("p.md", "a", r"named \.txt, \.csv, \.tsv or \.jsonl, got '\.md'"),
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
