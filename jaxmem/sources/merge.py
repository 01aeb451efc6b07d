"""What is put into a pipeline of diffusers by its own loaders: words of textual inversions, and LoRA, fused."""

import hashlib
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open

from jaxmem.extras import require
from jaxmem.runs.progress import Say
from jaxmem.sources.additions import Additions, Lora
from jaxmem.sources.opened import quiet_libraries
from jaxmem.stable_diffusion.settings import Reading

_NAME = "jaxmem"  # of an adapter while it is loaded
_NAMELESS = "emb_params"  # AUTOMATIC1111's, where the file's name is the word
# The first factor of a pair: PEFT's, kohya's, and diffusers' before PEFT.
_FIRST = re.compile(r"lora_A\.|lora_down\.|lora\.down\.|_lora\.down\.|lora_linear_layer\.down\.")
# Additions of other forms than a product of two factors; diffusers refuses the one and leaves out the other.
_OTHER = re.compile(r"dora_scale|(^|[._])(hada|lokr|oft|boft|ia3|vera)([._]|$)|lora_mid", re.IGNORECASE)


def put_into(pipeline: Any, additions: Additions, reading: Reading, say: Say) -> None:
    """Add words and fuse LoRA, in this order, into a pipeline that is nobody else's; named in what was chosen.

    Raises:
        ValueError: a file that does not fit the model, or of which a part would be left out.
        MissingExtra: diffusers and torch are not installed.
    """
    if not additions:
        return
    require("diffusers", "a model with LoRA or embeddings")
    for path in additions.embedding:
        words = _add_words(pipeline, path)
        reading.chosen.setdefault("embedding", []).append({"words": list(words), "sha256": _sha256(path)})
        for word, vectors in words.items():
            say(f"{path.name}: the word {word} has {vectors} vector{'s' if vectors > 1 else ''}")
    for lora in additions.lora:
        pairs = _fuse(pipeline, lora)
        reading.chosen.setdefault("lora", []).append(
            {"file": lora.path.name, "scale": lora.scale, "sha256": _sha256(lora.path)}
        )
        say(f"{lora.path.name}: fused into {pairs} layers with scale {lora.scale:g}")


def _add_words(pipeline: Any, path: Path) -> dict[str, int]:
    """Add the words of a textual inversion, and give how many vectors each has."""
    from safetensors.torch import load_file

    content = load_file(path)
    words = {path.stem: content[_NAMELESS]} if _NAMELESS in content else content
    width = pipeline.text_encoder.get_input_embeddings().weight.shape[1]
    for word, vectors in words.items():
        if vectors.ndim not in (1, 2) or vectors.shape[-1] != width or not vectors.is_floating_point():
            raise ValueError(
                f"embedding: expected vectors of {width} numbers, which the model's text encoder has, got {word!r} of"
                f" shape {tuple(vectors.shape)} in {path}; it was made for another model"
            )
    for word, vectors in words.items():
        try:
            with quiet_libraries():
                pipeline.load_textual_inversion({word: vectors.float()}, token=word)
        except ValueError as error:  # of a word that is there already
            raise ValueError(f"embedding: expected words that are new to the tokenizer, got {path}: {error}") from None
    return {word: 1 if vectors.ndim == 1 else len(vectors) for word, vectors in words.items()}


def _fuse(pipeline: Any, lora: Lora) -> int:
    """Fuse a LoRA and take its layers out again; gives the number of layers that it changed."""
    with safe_open(lora.path, framework="numpy") as file:
        names = list(file.keys())
    other = [name for name in names if _OTHER.search(name)]
    if other:
        raise ValueError(
            f"lora: expected pairs of low-rank factors, got {lora.path} with {len(other)} tensors of another form"
            f" ({other[0]}, ...), which diffusers does not load; merge it with the program that made it"
        )
    expected = sum(_FIRST.search(name) is not None for name in names)
    try:
        with quiet_libraries():
            pipeline.load_lora_weights(
                str(lora.path.parent), weight_name=lora.path.name, adapter_name=_NAME, local_files_only=True
            )
    except Exception as error:  # of diffusers, peft and torch, about names and shapes
        raise ValueError(
            f"lora: expected one that diffusers loads into the model, got {lora.path}"
            f" ({type(error).__name__}: {error!s:.400})"
        ) from error
    found = sum(
        _NAME in getattr(module, "lora_A", ())
        for part in _adapted(pipeline)
        for module in getattr(pipeline, part).modules()
    )
    if found != expected or not found:
        raise ValueError(
            f"lora: expected one whose layers the model has, got {lora.path}, of whose {expected} layers it has"
            f" {found}; it was made for another model, and what does not fit would be left out"
        )
    with quiet_libraries():
        pipeline.fuse_lora(lora_scale=lora.scale, adapter_names=[_NAME])
        pipeline.unload_lora_weights()
    return found


def _adapted(pipeline: Any) -> list[str]:
    """The networks that a LoRA may change."""
    return [name for name in pipeline._lora_loadable_modules if getattr(pipeline, name, None) is not None]


def has_lora(pipeline: Any) -> bool:
    """Whether layers of PEFT are in networks of a pipeline, also disabled ones."""
    return any(
        hasattr(module, "lora_A") and hasattr(module, "base_layer")
        for part in getattr(pipeline, "_lora_loadable_modules", ())
        for module in getattr(getattr(pipeline, part, None), "modules", tuple)()
    )


def fuse_active(pipeline: Any) -> None:
    """Fuse the adapters that are active in a pipeline which is nobody else's, with their scales, and drop the others.

    Raises:
        ValueError: some layers have them disabled and others not.
    """
    disabled = {
        bool(module.disable_adapters)
        for part in _adapted(pipeline)
        for module in getattr(pipeline, part).modules()
        if hasattr(module, "lora_A") and hasattr(module, "disable_adapters")
    }
    if len(disabled) == 2:
        raise ValueError(
            "live pipeline: expected LoRA that is enabled or disabled everywhere, got both; call pipe.enable_lora() or"
            " pipe.disable_lora()"
        )
    with quiet_libraries():
        if disabled == {False}:
            pipeline.fuse_lora()
        pipeline.unload_lora_weights()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
