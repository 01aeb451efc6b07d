"""What a pipeline needs, counted from the heads of its files, before one of them is read."""

from importlib.util import find_spec

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxmem.runs import memory
from jaxmem.sources.needs import needs
from jaxmem.sources.opened import open_any
from jaxmem.stable_diffusion.settings import Reading


@pytest.fixture
def folder(tmp_path):
    """Parts as diffusers and transformers save them: 300 numbers of a network in two files, 50 of an encoder."""
    for part in ("transformer", "text_encoder", "scheduler"):
        (tmp_path / part).mkdir()
    files = {"a": "diffusion_pytorch_model-1-of-2.safetensors", "b": "diffusion_pytorch_model-2-of-2.safetensors"}
    save_file({"a": np.ones((10, 20), np.float16)}, tmp_path / "transformer" / files["a"])
    save_file({"b": np.ones((100,), np.float16)}, tmp_path / "transformer" / files["b"])
    index = str({"weight_map": files}).replace("'", '"')
    (tmp_path / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text(index)
    save_file({"c": np.ones((5, 10), np.float32)}, tmp_path / "text_encoder/model.safetensors")
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    return tmp_path


def test_counted_from_the_heads(folder):
    found = needs(folder)
    assert found.parts == {"text_encoder": 50, "transformer": 300}
    assert [found.jax_bytes(kind) for kind in ("float32", "bfloat16")] == [1200, 600]
    # torch opens all in float32, whatever the files have; then its network goes
    assert [found.opening_bytes(kind) for kind in ("float32", "bfloat16")] == [1400 + 1200, 1400 + 600]
    assert [found.kept_bytes(kind) for kind in ("float32", "bfloat16")] == [200 + 1200, 200 + 600]


def test_no_number_is_read(folder):
    """The files end behind their heads, so that a number in them could not be had."""
    for file in folder.glob("*/*.safetensors"):
        data = file.read_bytes()
        head = 8 + int.from_bytes(data[:8], "little")
        with file.open("r+b") as stream:  # of the same length, with a hole
            stream.truncate(head)
            stream.truncate(len(data))
    assert needs(folder).parts == {"text_encoder": 50, "transformer": 300}


@pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers is not installed")
def test_too_little_memory_is_said_before_anything_is_opened(folder, monkeypatch):
    import diffusers

    def opened(*_, **__):
        raise AssertionError("opened")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", opened)
    monkeypatch.setattr(memory, "available_bytes", lambda: 2_300)
    said = []
    with pytest.raises(ValueError, match=r"needs about 0\.0 MB, .* free; .*keep rounded ones with `parameters='bfl"):
        open_any(folder, Reading(), said.append)
    assert "transformer 0.00 million" in said[0]
    with pytest.raises(AssertionError, match="opened"):  # 2,000 bytes fit
        open_any(folder, Reading(parameters="bfloat16"), said.append)
    monkeypatch.setattr(memory, "available_bytes", lambda: 1_900)
    with pytest.raises(ValueError, match=r"use a larger machine$"):
        open_any(folder, Reading(parameters="bfloat16"), said.append)
