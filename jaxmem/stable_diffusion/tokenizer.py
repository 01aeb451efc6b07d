"""A CLIP tokenizer of bytes, for models trained here: it accepts any text and needs no vocabulary file."""

from typing import Any

NUM_TOKENS = 514  # 256 bytes, 256 bytes that end a word, and the two around a text


def byte_tokenizer(length: int = 77) -> Any:
    """CLIP's tokenizer without a single merge: a token is a byte of UTF-8, or the last one of its word.

    Texts are lower-cased and words cut as CLIP does; the default length is CLIP's.
    """
    from transformers import CLIPTokenizer

    letters = _printable_bytes()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=length)


def _printable_bytes() -> list[str]:
    """The character that stands for each byte in CLIP's (GPT-2's) vocabulary: itself, or one from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
