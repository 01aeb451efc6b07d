"""What an audit drew, as PNG files that another library reads, and the table that says which is which."""

import csv
import io

import numpy as np
import pytest
import synthetic_audit
from conftest import optional_import
from killing import Stopped
from two_kinds import TwoKinds

from jaxmem.audit import audit, engine, generations
from jaxmem.audit.generations import as_png, write_generations
from jaxmem.config import AuditConfig
from jaxmem.prompts import Prompt
from jaxmem.prompts.cells import from_cell

Image = optional_import("PIL.Image")
CONFIG = AuditConfig(noises=2, ddim_steps=4, timesteps=(250,), batch=4)


@pytest.mark.parametrize("shape", [(1, 1, 3), (5, 7, 3), (64, 33, 3)])
def test_pillow_reads_what_is_written(shape):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    with Image.open(io.BytesIO(as_png(image))) as found:
        assert found.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(found), image)


def test_each_image_is_found_by_its_prompt(tmp_path):
    result = synthetic_audit.audit(per_category=2, noises=2, size=8)
    result.sampled[1, 1] = False
    write_generations(result, tmp_path)
    with open(tmp_path / "generations.csv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 11 == len(list((tmp_path / "images").iterdir()))
    assert [int(row["place"]) for row in rows] == sorted(int(row["place"]) for row in rows)
    order = result.ranking.order.tolist()
    for row in rows:
        n, noise = int(row["number"]) - 1, int(row["noise"]) - 1
        assert order[int(row["place"]) - 1] == n
        assert from_cell(row["prompt"]) == result.prompts[n].text
        assert row["file"] == f"images/{n + 1:04d}-{noise + 1}.png"
        with Image.open(tmp_path / row["file"]) as found:
            np.testing.assert_array_equal(np.asarray(found), result.images[n, noise])


def test_without_images_nothing_is_written(tmp_path):
    write_generations(synthetic_audit.audit(per_category=2, images=False, size=8), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_kill_between_two_images_leaves_whole_ones(tmp_path, monkeypatch):
    """The second start writes the rest, before the run counts as finished."""
    prompts = [Prompt("copied cat", True), Prompt("varied dog", False)]
    whole, out = tmp_path / "whole", tmp_path / "run"
    audit(TwoKinds(), prompts, CONFIG, folder=whole)
    write, seen = generations.write_atomically, []

    def failing(path, *args):
        seen.append(path.name)
        if len(seen) == 3:
            raise Stopped(path.name)
        write(path, *args)

    with monkeypatch.context() as patched:
        patched.setattr(generations, "write_atomically", failing)
        with pytest.raises(Stopped):
            audit(TwoKinds(), prompts, CONFIG, folder=out)
    assert sorted(path.name for path in (out / "images").iterdir()) == sorted(seen[:2])
    assert not (out / "metrics.json").exists()
    kept = (out / "images" / seen[0]).stat().st_mtime_ns
    assert engine.audit(TwoKinds(), prompts, CONFIG, folder=out).metrics is not None
    assert (out / "images" / seen[0]).stat().st_mtime_ns == kept
    names = sorted(path.name for path in (whole / "images").iterdir())
    assert names == ["0001-1.png", "0001-2.png", "0002-1.png", "0002-2.png"]
    for name in ("results.csv", "generations.csv", *(f"images/{name}" for name in names)):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
