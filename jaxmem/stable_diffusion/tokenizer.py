"""What stands before a CLIP tokenizer, and one of bytes, for models trained here, which needs no vocabulary file."""

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmem.stable_diffusion.configs import TextEncoderConfig

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


def write_out(tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Prompts in which textual inversions of several vectors are written out, as diffusers' pipelines do first.

    A token ``<cat>`` beside which the tokenizer has ``<cat>_1``, ``<cat>_2``, ... becomes ``<cat> <cat>_1 <cat>_2 ...``
    wherever its text is in a prompt that has the token, in the spelling it was added with.

    Raises:
        ValueError: the result depends on which of two tokens comes first, which diffusers leaves to chance.
    """
    added = tokenizer.added_tokens_encoder
    vectors = {}
    for token in added:
        if f"{token}_1" in added:
            count = next(i for i in itertools.count(1) if f"{token}_{i}" not in added)
            vectors[token] = " ".join([token, *(f"{token}_{i}" for i in range(1, count))])
    if not vectors:
        return list(prompts)

    def written(prompt: str) -> str:
        ids = tokenizer(prompt, truncation=False, add_special_tokens=False, verbose=False).input_ids
        tokens = sorted(vectors.keys() & set(tokenizer.convert_ids_to_tokens(ids)))
        forwards, backwards = prompt, prompt
        for one, other in zip(tokens, reversed(tokens), strict=True):
            forwards = forwards.replace(one, vectors[one])
            backwards = backwards.replace(other, vectors[other])
        if forwards != backwards:
            raise ValueError(
                f"{prompt!r:.200}: expected textual inversions whose texts are not in each other, got"
                f" {' and '.join(tokens)}; diffusers replaces them in an order that differs from run to run; write them"
                f" in separate prompts"
            )
        return forwards

    return [written(prompt) for prompt in prompts]


def _printable_bytes() -> list[str]:
    """The character that stands for each byte in CLIP's (GPT-2's) vocabulary: itself, or one from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def whole_tokens(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt, neither cut nor padded, with all vectors of its textual inversions."""
    # Not verbose: the tokenizer has a warning of its own for long ones.
    return tokenizer(write_out(tokenizer, prompts), truncation=False, verbose=False).input_ids


def rows_of_words(tokenizer: Any, prompt: str, length: int) -> list[slice] | None:
    """Which tokens of a prompt each of its words has, between the two around a text; fewer where a word is cut off.

    None where the tokens of the prompt are not those of its words.
    """
    whole, *words = (ids[1:-1] for ids in whole_tokens(tokenizer, [prompt, *prompt.split()]))
    if list(itertools.chain(*words)) != whole:
        return None
    ends = np.minimum(1 + np.cumsum([len(ids) for ids in words]), length - 1)  # the last is the end token
    return [slice(int(first), int(end)) for first, end in zip([1, *ends[:-1]], ends, strict=True)]


def tokenize(tokenizer: Any, config: TextEncoderConfig, prompts: Sequence[str]) -> np.ndarray:
    """Token ids, shape (n, tokens): padded to the encoder's length, or cut to it, with a warning.

    Raises:
        ValueError: tokenizer and text encoder do not fit together, or one text instead of a list.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts: expected a list of texts, got one text; write [prompt]")
    length = config.max_position_embeddings
    if tokenizer.model_max_length != length:
        raise ValueError(
            f"tokenizer: expected model_max_length {length} (the text encoder's max_position_embeddings), got"
            f" {tokenizer.model_max_length}; do they belong together?"
        )
    truncated = [len(ids) > length for ids in whole_tokens(tokenizer, prompts)]
    long = [prompt for prompt, cut in zip(prompts, truncated, strict=True) if cut]
    if long:
        warnings.warn(
            f"{len(long)} prompt(s) of more than {length} tokens are cut, as in diffusers: {long[0]!r:.60}",
            stacklevel=4,
        )
    texts = write_out(tokenizer, prompts)
    cut = tokenizer(texts, padding="max_length", max_length=length, truncation=True).input_ids
    tokens = np.asarray(cut, np.int32)
    if tokens.max() >= config.vocab_size:
        raise ValueError(
            f"tokenizer: expected tokens below {config.vocab_size} (the text encoder's"
            f" vocab_size), got {tokens.max()}; do tokenizer and text encoder belong together?"
        )
    return tokens
