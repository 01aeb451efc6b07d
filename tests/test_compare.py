"""Comparisons of checkpoints, on a closed form whose single pictures sharpen with the step, and on made-up signs."""

import csv
import json
import re
import shutil
from dataclasses import replace
from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import pytest
from album import MANY, SIDE, SINGLE, VARIANCE, Album, single_pictures, varied_pictures, write_folder

import jaxmem as jm
from jaxmem import cli
from jaxmem.audit.training.found import Whatever
from jaxmem.audit.training.given import TrainingData
from jaxmem.audit.training.records import WITH, WITHOUT
from jaxmem.commands.output import model_name
from jaxmem.comparison.checkpoint import HELD_OUT, Distances, group_mean
from jaxmem.comparison.onset import Sign, advise, probability_by_chance
from jaxmem.comparison.steps import Place
from jaxmem.memorization.chance import level_of
from jaxmem.memorization.verdicts import Verdict
from jaxmem.report.comparison.page import render
from jaxmem.training_images import Preparation, read_training_images

NUM_MANY, NUM_HELD_OUT, JUDGED = 12, 24, 150
CONFIG = jm.AuditConfig(noises=2, ddim_steps=20, timesteps=(250,), directions=0)
#: Variance of the single pictures by step; the first and its duplicate, the second, the third.
VARIANCES = {100: (0.3, 0.3, 0.3), 200: (0.3, 0.03, 0.1), 300: (0.02, 0.01, 0.1), 400: (0.0, 0.0, 0.01)}
SERIES = "checkpoint-*"


class Trained(Album):
    """The album in training: what its captions give varies less and less about their pictures."""

    def __init__(self, variances):
        super().__init__(single_pictures())
        self.state = self.state._replace(variances=jnp.array([*variances, VARIANCE], jnp.float32))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Runs by step."""
    folder = tmp_path_factory.mktemp("training")
    single, varied = single_pictures(), varied_pictures(NUM_MANY, 1)
    captions = [*SINGLE, SINGLE[0], *[MANY] * NUM_MANY]
    data = read_training_images(write_folder(folder / "data", [*single, single[0], *varied], captions))
    others = write_folder(folder / "others", varied_pictures(NUM_HELD_OUT, 2), [MANY] * NUM_HELD_OUT)
    training = TrainingData(
        data, read_training_images(others), image_timesteps=(JUDGED, 50), preparation=Preparation(resize="none")
    )
    for step, variances in VARIANCES.items():
        path = folder / f"checkpoint-{step}"
        jm.audit(Trained(variances), config=CONFIG, folder=path, training=training)
    return {step: folder / f"checkpoint-{step}" for step in VARIANCES}


@pytest.fixture(scope="module")
def found(folders):
    return jm.compare(reversed(folders.values()))


@pytest.fixture
def copied(folders, tmp_path):
    """Makes a copy of a run under another name, its manifest, metrics or rows changed."""

    def copy(step, name, change=lambda manifest: None, model=None, finished=True):
        path = tmp_path / name
        shutil.copytree(folders[step], path)
        manifest = json.loads((path / "manifest.json").read_text())
        change(manifest)
        (path / "manifest.json").write_text(json.dumps(manifest))
        metrics = json.loads((path / "metrics.json").read_text())
        (path / "metrics.json").write_text(json.dumps(metrics | ({} if model is None else {"model": model})))
        if not finished:
            (path / "metrics.json").unlink()
        return path

    return copy


class TestNumbers:
    def test_the_order_is_that_of_the_steps(self, found):
        assert [one.place for one in found.checkpoints] == [(step, SERIES) for step in VARIANCES]

    def test_first_reproduced_steps(self, found):
        """A picture of variance 0.03 about its image has a calibrated distance below 0.5, one of 0.1 has not."""
        assert found.first("reproduced", SERIES) == [300, 200, 400, 300, *[None] * NUM_MANY]
        assert [one.number["reproduced"] for one in found.checkpoints] == [0, 1, 3, 4]
        assert [one.reproduced for one in found.checkpoints] == [0, 1, 2, 3]  # the duplicate counts once

    def test_first_isolated_is_that_word_alone(self, found):
        for i, step in enumerate(found.first("isolated", SERIES)):
            words = {one.place.step: one.words[i] for one in found.checkpoints}
            assert step == next((at for at, word in words.items() if word == "isolated"), None)

    def test_counts_are_those_of_the_gaussians(self, found):
        """A direction is free where α² v > σ²; all of a picture's are, or none."""
        schedule = Trained(VARIANCES[100]).schedule
        ratio = (float(schedule.sigma[JUDGED]) / float(schedule.alpha[JUDGED])) ** 2
        means = []
        for one in found.checkpoints:
            first, second, third = (v > ratio for v in VARIANCES[one.place.step])
            free = np.array([first, second, third, first, *[True] * NUM_MANY])
            assert one.counts["tangent-count", WITH].value == pytest.approx(SIDE * SIDE * free.mean())
            for name in (WITHOUT, HELD_OUT):  # of varied pictures
                assert one.counts["tangent-count", name] == (SIDE * SIDE,) * 3
            means.append(one.counts["tangent-count", WITH].value)
        assert means[0] == SIDE * SIDE
        assert all(later <= earlier for earlier, later in pairwise(means))
        assert means[-1] < means[0]

    def test_areas_are_shares_of_pairs(self, found, folders):
        """AUC by its definition: pairs of a noised training image and a noised held-out one; the duplicate once."""
        for step, folder in folders.items():
            look = jm.read_audit(folder).training.looks[WITH]
            scores = look.column(f"denoising-error@t{JUDGED}")
            means = scores.mean(1)  # an image is one example
            trained, others = np.delete(means[:-NUM_HELD_OUT], 3)[:, None], means[-NUM_HELD_OUT:]
            pairs = (trained < others) + 0.5 * (trained == others)
            there = next(one for one in found.checkpoints if one.place.step == step)
            assert there.areas["denoising-error", WITH].value == pytest.approx(pairs.mean())

    def test_distances_are_of_the_captions_generations(self, found, folders):
        for one, folder in zip(found.checkpoints, folders.values(), strict=True):
            points = jm.read_audit(folder).training.nearest.calibrated[: 2 * 4]  # the last prompt is none
            assert one.distances.number == 8
            assert one.distances.median == pytest.approx(np.sort(points)[3:5].mean())
            assert one.distances.smallest == points.min()
        medians = [one.distances.median for one in found.checkpoints]
        assert medians == sorted(medians, reverse=True)

    def test_share_has_the_interval_of_clopper_and_pearson(self, found):
        one = found.checkpoints[0].share  # 0 of 15 groups: the upper end has probability 2.5 % of none
        assert (one.value, one.low) == (0, 0)
        assert (1 - one.high) ** 15 == pytest.approx(0.025)
        assert found.checkpoints[1].share.value == pytest.approx(1 / 15)

    def test_duplicates_are_resampled_together(self):
        values = np.array([[0.0, 2.0], [4.0, 6.0], [np.nan, 8.0], [1.0, 1.0]])
        groups = np.array([5, 5, 7, 9])
        spread = group_mean(values, groups)
        assert spread.value == pytest.approx(22 / 7)
        assert spread.low >= 1
        assert spread.high <= 8
        alone = group_mean(values[:2], groups[:2])
        assert alone.value == 3
        assert np.isnan(alone.low)

    def test_nothing_is_returned_without_a_caption(self, found):
        assert [(one.whatever.copies, one.whatever.drawn) for one in found.checkpoints] == [(0, 2)] * 4


class TestAdvice:
    def test_where_the_data_carries_it(self, found):
        (advice,) = found.advice
        assert (advice.series, advice.stop_before, advice.last_without) == (SERIES, 200, 100)
        assert [sign.there for sign in found.signs] == [False, True, True, True]

    @pytest.mark.parametrize(
        ("reproduced", "expected", "reason"),
        [
            ((0, 0, 3, 4), (3, 2), "Step 3 is the first that shows a sign, and every later one does (1)"),
            ((0, 2, 3), (2, 1), "every later one does (1)"),
            ((0, 0, 0), (None, None), "No checkpoint up to step 3 shows a sign"),
            ((1, 2, 3), (None, None), "The first checkpoint that can tell, step 1, shows a sign"),
            ((0, 0, 1), (None, None), "Only the last checkpoint, step 3"),
            ((0, 1, 0, 2), (None, None), "step 3 shows none: the signs do not stay"),
            ((0, 1, None, 2), (2, 1), "1 checkpoint cannot tell and is left out"),
            ((None, None), (None, None), "Nothing that was drawn"),
        ],
    )
    def test_the_rule(self, reproduced, expected, reason):
        signs = [Sign(n, None, np.nan, np.nan, None if n is None else n > 0) for n in reproduced]
        advice = advise("raw", range(1, len(signs) + 1), signs)
        assert (advice.stop_before, advice.last_without) == expected
        assert reason in advice.reason

    def test_images_that_are_reproduced_no_more_are_no_onset(self):
        signs = [Sign(0, 0, 1, 1, False), Sign(2, 5, 1, 1e-4, True), Sign(0, 5, 1, 1e-4, True)]
        assert advise("", (1, 2, 3), signs).stop_before is None
        assert "at step 3 no image is reproduced any more" in advise("", (1, 2, 3), signs).reason

    @pytest.mark.parametrize(("held_out", "images"), [(24, 15), (120, 40)])
    def test_chance_is_that_of_ranks(self, held_out, images):
        """Draws of exchangeable numbers: how many of the images rank high enough among the held-out ones."""
        random, draws = np.random.default_rng(0), 20_000
        numbers = random.random((draws, held_out + images))
        others = np.sort(numbers[:, :held_out], 1)
        p = [(1 + held_out - np.searchsorted(row, image)) / (held_out + 1) for row, image in zip(
            others, numbers[:, held_out:], strict=True
        )]  # fmt: skip
        passed = (np.array(p) <= level_of(held_out) + 1e-12).sum(1)
        for number in (1, 2, 4):
            expected = (passed >= number).mean()
            assert probability_by_chance(number, images, held_out) == pytest.approx(expected, abs=0.012)
        assert probability_by_chance(0, images, held_out) == 1


class TestNames:
    def test_series_are_told_apart(self, folders, copied):
        averages = [copied(step, f"checkpoint-{step}-ema") for step in (100, 200, 300)]
        found = jm.compare([*averages, *folders.values()])
        assert {name: [one.place.step for one in each] for name, each in found.series.items()} == {
            "checkpoint-*-ema": [100, 200, 300],
            SERIES: [100, 200, 300, 400],
        }
        assert [advice.stop_before for advice in found.advice] == [200, 200]
        page = render(found)
        assert "step 200 · checkpoint-*-ema" in page

    def test_the_network_comes_before_the_model_and_the_folder(self, copied):
        def network(name):
            return lambda manifest: manifest["model"].update(unet_weights=name)

        runs = [
            copied(100, "run-7", network("checkpoint-500/unet_ema")),
            copied(200, "run-8", network("checkpoint-1000/unet_ema")),
            copied(100, "run-9", model="sd-2, LoRA checkpoint-0500/pytorch_lora_weights.safetensors"),
            copied(200, "epoch-3"),
            copied(100, "e4"),
        ]
        found = jm.compare(runs)
        assert [(one.place.series, one.place.step) for one in found.checkpoints] == [
            ("checkpoint-*/unet_ema", 500),
            ("checkpoint-*/unet_ema", 1000),
            ("LoRA checkpoint-*/pytorch_lora_weights.safetensors", 500),
            ("epoch-*", 3),
            ("e*", 4),
        ]

    def test_steps_and_series_that_are_given(self, copied):
        runs = [copied(100, "a"), copied(200, "b"), copied(100, "c")]
        found = jm.compare(runs, steps=[5, 6, 5], series=["raw", "raw", "average"])
        assert [one.place for one in found.checkpoints] == [(5, "raw"), (6, "raw"), (5, "average")]

    def test_a_lora_is_in_the_name_of_the_model(self):
        name = model_name("owner/model", ("out/checkpoint-20/pytorch_lora_weights.safetensors:0.5",))
        assert name == "owner/model, LoRA checkpoint-20/pytorch_lora_weights.safetensors:0.5"

    def test_no_step_two_of_one_and_too_few(self, copied, folders):
        runs = [copied(100, "first"), copied(200, "second-2-of-3")]
        with pytest.raises(ValueError, match=r"steps: expected .* none of .*first, .*second-2-of-3; give `steps`"):
            jm.compare(runs)
        with pytest.raises(ValueError, match="steps: expected one for each of the 2 runs, got 1"):
            jm.compare(runs, steps=[1])
        with pytest.raises(ValueError, match="steps: expected training steps, 0 or more, got -1"):
            jm.compare(runs, steps=[1, -1])
        with pytest.raises(ValueError, match=r"runs: expected one run of each step of a series, got two of step 1, "):
            jm.compare(runs, steps=[1, 1])
        with pytest.raises(ValueError, match="runs: expected two or more, got 1"):
            jm.compare([folders[100]])


class TestRefusals:
    def test_other_images(self, folders, copied):
        other = copied(200, "checkpoint-900", lambda manifest: manifest["training"].update(images_sha256="0" * 64))
        with pytest.raises(ValueError, match=r"the same training images .* got others in .*checkpoint-900"):
            jm.compare([folders[100], other])

    def test_other_settings_are_named_of_each_run(self, folders, copied):
        one = copied(200, "checkpoint-900", lambda manifest: manifest["plan"].update(guidance=7.5))
        two = copied(200, "checkpoint-901", lambda manifest: manifest["training"].update(noises=3))
        expected = r"checkpoint-900 \(plan.guidance: there 1.0, now 7.5\), .*901 \(training.noises: there 2, now 3\)"
        with pytest.raises(ValueError, match=expected):
            jm.compare([folders[100], one, two])

    def test_batches_and_what_is_shown_may_differ(self, folders, copied):
        def change(manifest):
            manifest["config"]["batch"] = 4
            manifest["training"]["show"] = False

        found = jm.compare([folders[100], copied(200, "checkpoint-200", change)])
        assert found.thumbnails is None  # one run hides them

    def test_a_run_without_training_images(self, folders, copied):
        with pytest.raises(ValueError, match=r"checkpoint-900: expected the run of an audit with training images"):
            jm.compare([folders[100], copied(200, "checkpoint-900", lambda manifest: manifest.pop("training"))])

    def test_a_run_that_has_not_come_to_the_images(self, folders, copied):
        run = copied(200, "checkpoint-900", finished=False)
        (rows,) = run.glob("results-*.jsonl")
        kept = [line for line in rows.read_text().splitlines(keepends=True) if '"images"' not in line]
        rows.write_text("".join(kept))
        with pytest.raises(ValueError, match=r"checkpoint-900: expected an audit that has come to its training images"):
            jm.compare([folders[100], run])

    def test_an_unfinished_run_is_compared_and_named(self, folders, copied, found):
        run = copied(400, "checkpoint-400", finished=False)
        again = jm.compare([folders[100], folders[200], folders[300], run])
        assert again.checkpoints[-1].words == found.checkpoints[-1].words
        assert again.checkpoints[-1].areas == found.checkpoints[-1].areas  # not from metrics
        assert "1 of 4 runs is not finished:" in re.sub(r"<[^>]+>", "", render(again))


class TestFiles:
    def test_the_table_has_a_row_for_each_image_and_run(self, found, tmp_path):
        with found.to_csv(tmp_path / "comparison.csv").open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        assert len(rows) == 4 * (len(SINGLE) + 1 + NUM_MANY)
        assert [row["step"] for row in rows if row["image"] == "001.png"] == list(map(str, VARIANCES))
        words = [row["verdict"] for row in rows if row["image"] == "001.png"]
        assert words[1:] == ["reproduced"] * 3
        assert "held out" not in rows[0]
        table = found.to_dataframe()
        assert list(table.columns) == list(rows[0])

    def test_the_page(self, found):
        page = render(found, written="today")
        assert page == render(found, written="today")
        text = " ".join(re.sub(r"<[^>]+>", " ", page.partition("<main>")[2]).split())
        assert "Stop before step 200." in text
        assert "The first checkpoint at which an image is reproduced: step 200 ." in text
        assert "The quality of samples is not measured." in text
        assert page.count("data:image/svg+xml") == 1
        addresses = re.findall(r"(?:src|href)=\"([^\"]*)\"", page)
        assert all(address.startswith(("data:", "#")) for address in addresses)
        rows = re.findall(r'<tr data-search="(\d+)\.png', page)
        assert rows[0] == "001"  # reproduced the earliest
        assert set(rows[:4]) == {"000", "001", "002", "003"}
        assert page.count('<td class="reproduced"') == 0 + 1 + 3 + 4

    def test_a_page_of_little(self, found):
        """Nothing drawn, no look and no held-out images; two series at one step."""
        little = replace(
            found,
            checkpoints=tuple(
                replace(
                    one, place=Place(7, name), drawn=False, distances=Distances(0), counts={}, areas={}, judged=None,
                    whatever=Whatever(0, 0, 0), verdicts=[Verdict("not decided", ("nothing",))] * len(one.verdicts),
                    evidence=[replace(e, held_out=0, p_value=np.nan, closest=np.nan) for e in one.evidence],
                )
                for one, name in zip(found.checkpoints, ("raw", "average"), strict=False)
            ),
            thumbnails=None,
        )  # fmt: skip
        page = render(little)
        assert [advice.stop_before for advice in little.advice] == [None, None]
        assert page.count("Nothing that was drawn from the captions was compared with the images") == 2
        assert "Isolated images are not counted here" in page
        assert page.count("data:image/png") == 0

    def test_the_command(self, folders, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "140")
        runs = list(map(str, folders.values()))
        assert cli.main(["compare", *runs, "--out", str(tmp_path / "out")]) == 0
        shown = capsys.readouterr().out
        assert "stop before step 200" in shown
        assert "31.5" in shown
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["comparison.csv", "comparison.html"]
        assert cli.main(["compare", *runs, "--steps", "1", "--out", str(tmp_path / "other")]) == 2
        assert capsys.readouterr().err == "jaxmem: --steps: expected one for each of the 4 runs, got 1\n"
        assert not (tmp_path / "other").exists()
