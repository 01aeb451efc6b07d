"""The byte tokenizer: every text has tokens, one per byte, and transformers reads what is saved."""

import numpy as np
import pytest
from transformers import CLIPTokenizer

from jaxmem.stable_diffusion.tokenizer import NUM_TOKENS, byte_tokenizer


@pytest.mark.parametrize("text", ["a thin three", "ünïcödé 漢字 🙂", "<script>alert(1)</script>", "", "  two   words "])
def test_a_token_is_a_byte_of_a_word(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text).input_ids
    assert [ids[0], ids[-1]] == [512, 513]
    words = tokenizer.decode(ids[1:-1]).split()
    assert "".join(words) == "".join(text.split())
    assert len(ids) - 2 == len("".join(text.split()).encode())  # CLIP drops white space


def test_the_last_byte_of_a_word_has_a_token_of_its_own():
    ids = byte_tokenizer()("ab b").input_ids[1:-1]
    a, b = ord("a") - ord("!"), ord("b") - ord("!")
    assert ids == [a, 256 + b, 256 + b]


def test_texts_are_padded_and_cut_to_the_length():
    tokenizer = byte_tokenizer()
    ids = tokenizer(["cat", "x" * 10_000], padding="max_length", truncation=True).input_ids
    assert np.shape(ids) == (2, 77)
    assert ids[0][5:] == [513] * 72
    assert ids[1][-1] == 513


def test_what_is_saved_is_read_again(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    text = "the amber anchor, № 5"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert (again.model_max_length, len(again)) == (77, NUM_TOKENS)
