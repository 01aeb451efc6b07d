"""Audits with training images: looks, nearest images, verdicts and their files, against closed forms."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from album import MANY, SIDE, SINGLE, VARIANCE, Album, single_pictures, varied_pictures, write_folder
from killing import Stopped, stop

import jaxmem as jm
from jaxmem.audit.training.found import LookFound, _among
from jaxmem.audit.training.given import TrainingData
from jaxmem.audit.training.look import _oddities
from jaxmem.audit.training.records import WITH, WITHOUT, ImageRecord
from jaxmem.audit.work import starting_noise
from jaxmem.training_images import Preparation, read_training_images

NUM_MANY, NUM_HELD_OUT = 12, 24
CONFIG = jm.AuditConfig(noises=2, ddim_steps=20, timesteps=(250,), directions=0)


def _training(folder, pictures, captions, held_out=None, **options):
    data = read_training_images(write_folder(folder / "data", pictures, captions))
    others = None
    if held_out is not None:
        others = read_training_images(write_folder(folder / "held-out", *held_out))
    options = {"image_timesteps": (150, 50), "preparation": Preparation(resize="none")} | options
    return TrainingData(data, others, **options)


def _setting():
    from jaxmem.detectors import Setting

    return Setting(
        timesteps=(150,), spectral_timesteps=(150,), method="eigh", num_eigenvalues=36, at_images=True, image_pairs=True
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("album")


@pytest.fixture(scope="module")
def training(folder):
    """Three single pictures, the first twice, and varied ones; held out are varied ones."""
    single, varied = single_pictures(), varied_pictures(NUM_MANY, 1)
    pictures = [*single, single[0], *varied]
    captions = [*SINGLE, SINGLE[0], *[MANY] * NUM_MANY]
    return _training(folder, pictures, captions, (varied_pictures(NUM_HELD_OUT, 2), [MANY] * NUM_HELD_OUT))


@pytest.fixture(scope="module")
def model():
    return Album(single_pictures())


@pytest.fixture(scope="module")
def audited(folder, model, training):
    lines = []
    found = jm.audit(model, config=CONFIG, folder=folder / "run", training=training, say=lines.append)
    return found, lines


class TestLook:
    def test_denoising_errors_are_those_of_the_gaussian(self, audited, model):
        """E[x_0 | x_t] of N(0, v I): a shrunk x_t; of one picture: the picture."""
        look = audited[0].training.looks[WITH]
        noise = starting_noise(0, 2, (SIDE, SIDE, 1))
        for t in look.timesteps:
            errors = look.column(f"denoising-error@t{t}")
            alpha, sigma = float(model.schedule.alpha[t]), float(model.schedule.sigma[t])
            assert np.abs(errors[: len(SINGLE)]).max() < 1e-5  # float32: σ² s and x_t cancel
            shrink = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
            for i, picture in enumerate(varied_pictures(NUM_MANY, 1)):
                x_0 = picture[..., None] / 127.5 - 1
                expected = [np.square(shrink * (alpha * x_0 + sigma * one) - x_0).mean() for one in noise]
                np.testing.assert_allclose(errors[len(SINGLE) + 1 + i], expected, rtol=1e-3, atol=1e-5)

    def test_gains_are_the_logarithms_of_the_two_errors(self, audited):
        looks = audited[0].training.looks
        for t in looks[WITH].timesteps:
            given, without = (looks[name].column(f"denoising-error@t{t}") for name in (WITH, WITHOUT))
            gain = looks[WITH].column(f"denoising-gain@t{t}")
            np.testing.assert_allclose(gain, np.log((without + 1e-12) / (given + 1e-12)), rtol=1e-5, atol=1e-5)
            assert (gain[: len(SINGLE)] > 5).all()  # without its caption it is one of many
            assert f"denoising-gain@t{t}" not in [detector.name for detector in looks[WITHOUT].detectors]

    def test_spectra_are_those_of_the_gaussian(self, audited, model):
        for name in (WITH, WITHOUT):  # without a caption the model gives varied pictures
            look = audited[0].training.looks[name]
            for k, t in enumerate(look.timesteps):
                alpha, sigma = float(model.schedule.alpha[t]), float(model.schedule.sigma[t])
                varied = -1 / (alpha**2 * VARIANCE + sigma**2)
                np.testing.assert_allclose(look.eigenvalues[len(SINGLE) + 1 :, :, k], varied, rtol=1e-3)
                single = -1 / sigma**2 if name == WITH else varied
                np.testing.assert_allclose(look.eigenvalues[: len(SINGLE), :, k], single, rtol=1e-3)

    def test_free_directions(self, audited):
        look = audited[0].training.looks[WITH]
        assert look.judged == 150
        assert (look.free[: len(SINGLE) + 1] == 0).all()
        assert (look.free[len(SINGLE) + 1 :] == SIDE * SIDE).all()  # α² v = 0.24 is more than σ² = 0.21


class TestVerdicts:
    def test_single_pictures_are_reproduced_and_varied_ones_are_not(self, audited):
        found = audited[0].training
        words = [verdict.word for verdict in found.verdicts]
        assert words[: len(SINGLE) + 1] == ["reproduced"] * (len(SINGLE) + 1)  # the copy of the first, too
        assert set(words[len(SINGLE) + 1 :]) <= {"no sign", "isolated"}
        assert words.count("isolated") <= 3  # by chance 0.05 of 12 are expected
        assert not found.whatever.memorized

    def test_duplicates_are_one_group(self, audited):
        groups = [record.group for record in audited[0].training.records]
        assert groups[0] == groups[3]
        assert len(set(groups)) == len(groups) - 1

    def test_the_nearest_image_of_a_generation_is_its_picture(self, audited):
        found = audited[0]
        for n, prompt in enumerate(found.prompts):
            if prompt.text in SINGLE:
                points = slice(2 * n, 2 * n + 2)
                assert (found.training.nearest.calibrated[points] < 0.05).all()
                group = [found.training.records[i].group for i in found.training.nearest.index[points]]
                assert group == [found.training.records[SINGLE.index(prompt.text)].group] * 2

    def test_captions_and_no_prompt_are_the_prompts(self, audited):
        assert [prompt.text for prompt in audited[0].prompts] == [*SINGLE, MANY, ""]

    def test_a_model_that_gives_one_picture_whatever_the_prompt(self, folder, tmp_path, training):
        model = Album(single_pictures(), without=(0.0, 1.0, 0.0, 0.0))
        found = jm.audit(model, config=replace(CONFIG, noises=4), folder=tmp_path / "run", training=training)
        whatever = found.training.whatever
        assert (whatever.drawn, whatever.copies, whatever.images, whatever.memorized) == (4, 4, 1, True)
        assert not whatever._replace(drawn=2, copies=2).memorized  # too few to say so
        page = (found.write_page(tmp_path / "page.html")).read_text()
        assert "Memorized whatever the class" in page
        verdict = found.training.verdicts[1]
        assert verdict.word == "reproduced"
        assert "4 of them without its caption" in verdict.reasons

    def test_without_held_out_images_the_rule_is_free_directions(self, model, tmp_path, folder, training):
        alone = replace(training, held_out=None)
        config = replace(CONFIG, steps_run=17)  # to t = 151: nothing is drawn to the end
        found = jm.audit(model, [SINGLE[1]], config, folder=tmp_path / "run", training=alone).training
        words = [verdict.word for verdict in found.verdicts]
        assert words[:4] == ["isolated"] * 4
        assert set(words[4:]) == {"not decided"}  # free, but nothing was drawn

    def test_too_few_held_out_images_decide_nothing(self, model, tmp_path):
        single, varied = single_pictures(), varied_pictures(NUM_MANY, 1)
        data = _training(
            tmp_path, [*single, *varied], [*SINGLE, *[MANY] * NUM_MANY], (varied_pictures(5, 2), [MANY] * 5)
        )
        config = replace(CONFIG, steps_run=17)
        found = jm.audit(model, config=config, folder=tmp_path / "run", training=data).training
        assert {verdict.word for verdict in found.verdicts} == {"not decided"}
        assert "5 held-out images were looked at, and it takes 19 to tell" in " ".join(found.verdicts[0].reasons)


class TestCompared:
    """What training images are compared with has to be like them, and all of it has to be there."""

    def test_held_out_images_without_captions_are_refused(self, model, tmp_path):
        write_folder(tmp_path / "data", varied_pictures(4, 1), [MANY] * 4)
        write_folder(tmp_path / "others", varied_pictures(4, 2), [MANY] * 4)
        (tmp_path / "others/metadata.jsonl").unlink()
        data = jm.TrainingData(*(read_training_images(tmp_path / name) for name in ("data", "others")))
        with pytest.raises(ValueError, match=r"held_out: expected images with captions .* got 4 of 4 held-out images"):
            jm.audit(model, config=CONFIG, folder=tmp_path / "run", training=data)
        assert not (tmp_path / "run").exists()

    def test_of_images_of_one_kind_as_many_are_isolated_as_is_said(self):
        """Measures that depend on each other, duplicates in both folders: p ≤ 5 % of 24 others is one rank of 25."""
        random, shares = np.random.default_rng(0), []
        detectors = jm.detectors.columns(
            jm.detectors.choose(["tangent-count", "largest-sum", "denoising-error"]), _setting()
        )
        group = [*range(20), 0, *range(20, 44), 20]
        records = [ImageRecord(str(i), (), "", i > 20, g, 1, i) for i, g in enumerate(group)]
        for _ in range(400):
            scores = random.normal(size=(44, 1, 1)) + 0.5 * random.normal(size=(44, 2, len(detectors)))
            look = LookFound(detectors, scores[group], (150,), (0.5,), np.zeros((46, 2, 1, 0)), 150)
            among = _among(look, records)
            assert among.reference == 24
            shares.append((among.p[:20] <= 0.05).mean())
        assert np.mean(shares) == pytest.approx(1 / 25, abs=4 * np.std(shares) / 20)

    def test_an_extended_run_is_compared_as_a_whole(self, model, training, tmp_path):
        config, folders = replace(CONFIG, steps_run=17), [tmp_path / name for name in "abc"]
        call = dict(training=replace(training, held_out=None), neutral=[])
        jm.audit(model, config=replace(config, noises=1), folder=folders[0], **call)
        jm.audit(model, config=replace(config, noises=1), folder=folders[1], **call)
        jm.audit(model, config=config, folder=folders[1], **call)
        jm.audit(model, config=config, folder=folders[2], **call)
        assert len(jm.compare(folders[1:], steps=[1, 2]).checkpoints) == 2
        with pytest.raises(ValueError, match="noises"):
            jm.compare(folders[:2], steps=[1, 2])

    def test_paraphrases_that_return_images_are_no_sign_of_any_prompt(self, training, tmp_path):
        model = Album(single_pictures())
        model.log_weights |= {f"the {name} one": model.log_weights[name] for name in SINGLE}
        prompts = [f"the {name} one" for name in SINGLE]
        found = jm.audit(model, prompts, CONFIG, folder=tmp_path / "run", training=training).training
        assert found.whatever == (0, 0, 0)
        assert [verdict.word for verdict in found.verdicts[:3]] == ["reproduced"] * 3

    def test_ritz_values_of_a_closed_space_leave_measures_out_for_all(self, model, training, tmp_path):
        """At one picture the Hessian is a multiple of the identity: a Krylov space closes after one step."""
        config = replace(CONFIG, method="lanczos", num_steps=6, steps_run=17)
        found = jm.audit(model, config=config, folder=tmp_path / "run", training=training).training
        assert found.statistics == ("denoising-error", "denoising-gain")
        assert [verdict.word for verdict in found.verdicts[:4]] == ["isolated"] * 4

    def test_a_look_that_was_stopped_has_the_reference_that_is_done(self, model, training, tmp_path, monkeypatch):
        from jaxmem.audit.training import look

        done = look.run_spectra
        monkeypatch.setattr(look, "run_spectra", lambda *args: stop())
        with pytest.raises(Stopped):
            jm.audit(model, config=CONFIG, folder=tmp_path / "run", training=training)
        found = jm.read_audit(tmp_path / "run").training
        assert {one.held_out for one in found.evidence} == {NUM_HELD_OUT}  # by the errors alone
        assert found.statistics == ("denoising-error", "denoising-gain")
        monkeypatch.setattr(look, "run_spectra", done)
        noised = look.run_noised
        monkeypatch.setattr(look, "run_noised", lambda *args: (noised(*args), stop()))
        shutil.rmtree(tmp_path / "run/at-images")
        monkeypatch.setattr(look.Plan, "batches", lambda plan: range(4 if plan.at_images else plan.num_batches))
        with pytest.raises(Stopped):
            jm.audit(model, config=CONFIG, folder=tmp_path / "run", training=training)
        monkeypatch.undo()
        found = jm.read_audit(tmp_path / "run").training
        assert {one.held_out for one in found.evidence} == {5}  # of 20 images in four batches of 10 points
        assert {verdict.word for verdict in found.verdicts[4:]} == {"not decided"}

    def test_a_model_whose_pictures_have_another_size_says_so_before_any_work(self, training, tmp_path):
        class Turned(Album):
            def decode(self, x):
                return super().decode(x)

        with pytest.raises(ValueError, match="training: expected a `picture_size` of a model with a `decode`"):
            jm.audit(Turned(single_pictures()), config=CONFIG, folder=tmp_path / "run", training=training)
        assert not (tmp_path / "run").exists()

    def test_a_limit_counts_captions(self, model, training):
        assert [prompt.text for prompt in training.prompts(model, 2)] == [*SINGLE[:2], ""]


class TestLimit:
    def test_fewer_images_are_looked_at_and_all_are_searched(self, audited, model, training, tmp_path):
        limited = replace(training, image_limit=5)
        found = jm.audit(model, config=CONFIG, folder=tmp_path / "run", training=limited).training
        whole = audited[0].training
        looked = np.array([record.look for record in found.records])
        assert [sorted(set(looked[looked >= 0].tolist()))] == [list(range(10))]  # five of each kind
        scores, every = found.looks[WITH].scores, whole.looks[WITH].scores
        assert np.isnan(scores[looked < 0]).all()
        np.testing.assert_allclose(scores[looked >= 0], every[looked >= 0], rtol=1e-4, atol=1e-5)  # other batches
        np.testing.assert_array_equal(found.nearest.index, whole.nearest.index)
        assert [verdict.word for verdict in found.verdicts[:4]] == ["reproduced"] * 4
        assert {verdict.word for verdict in found.verdicts[4:]} == {"not decided"}  # of five held-out images

    def test_equal_pictures_are_looked_at_once(self, audited):
        records = audited[0].training.records
        assert records[0].look == records[3].look
        assert max(record.look for record in records) == len(records) - 2


class TestFiles:
    def test_images_csv_has_a_row_for_each_image(self, audited, folder):
        with (folder / "run/images.csv").open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        assert len(rows) == len(audited[0].training.records)
        assert [row["verdict"] for row in rows[:4]] == ["reproduced"] * 4
        assert {row["held out"] for row in rows[-NUM_HELD_OUT:]} == {"1"}
        assert float(rows[0][f"tangent-count@t150 {WITH}"]) == 0

    def test_results_csv_has_the_verdict_of_each_prompt(self, audited, folder):
        with (folder / "run/results.csv").open(newline="") as stream:
            rows = {row["prompt"]: row for row in csv.DictReader(stream)}
        for number, name in enumerate(SINGLE):
            assert rows[name]["verdict"] == "returns training images"
            assert rows[name]["reasons"] == f"2 of 2 generations return {number:03d}.png"
        assert rows[MANY]["verdict"] == "not decided"  # no reference prompts
        assert rows[MANY]["reasons"] == "no generation returns a training image"

    def test_the_manifest_names_images_by_hash_alone(self, folder):
        text = (folder / "run/manifest.json").read_text()
        assert str(folder) not in text
        assert "000.png" not in text
        assert len(json.loads(text)["training"]["images_sha256"]) == 64

    def test_images_and_their_memory_are_said_before_the_start(self, audited):
        lines = audited[1]
        number = 3 + NUM_MANY + NUM_HELD_OUT  # one picture lies there twice
        # Of pictures so small only the products of blocks count, a quarter of a gibibyte.
        size = 2**28
        expected = (
            f"images: {4 + NUM_MANY} training images and {NUM_HELD_OUT} held-out ones, {number} looked at;"
            f" up to {size / 1e9:.1f} GB of memory to compare them"
        )
        assert expected in lines

    def test_images_without_captions_and_captions_without_images_are_said(self, tmp_path):
        folder = write_folder(tmp_path / "data", single_pictures(), SINGLE)
        images = read_training_images(folder)
        assert _oddities(images) == []
        bare = tuple(image._replace(captions=()) for image in images.images[:1])
        unused = tuple(f"{name}.txt" for name in "abcd")
        assert _oddities(replace(images, images=(*bare, *images.images[1:]), unused=unused)) == [
            "data: images without a caption: 1 of 3",
            "data: caption files that belong to no image: 4 (a.txt, b.txt, c.txt, …)",
        ]
        assert _oddities(replace(images, images=bare, unused=unused[:1])) == [
            "data: caption files that belong to no image: 1 (a.txt)"
        ]

    def test_thumbnails_only_where_they_are_shown(self, audited, model, training, tmp_path, folder):
        assert audited[0].training.thumbnails.shape == (len(audited[0].training.records), SIDE, SIDE, 3)
        hidden = jm.audit(model, config=CONFIG, folder=tmp_path / "run", training=replace(training, show=False))
        assert hidden.training.thumbnails is None
        assert not list((tmp_path / "run/arrays").glob("training-images*"))

    def test_a_run_of_other_images_is_refused(self, folder, model, training, tmp_path):
        shutil.copytree(folder / "run", tmp_path / "run")
        fewer = _training(tmp_path, varied_pictures(NUM_MANY, 1), [MANY] * NUM_MANY)
        with pytest.raises(ValueError, match=r"training\.images"):
            jm.audit(model, [*SINGLE, MANY, ""], CONFIG, folder=tmp_path / "run", training=fewer)

    def test_cost_is_said_before(self, audited):
        assert any("training images" in line for line in audited[1])

    def test_work_and_time_of_the_looks_are_counted(self, audited, folder):
        files = [folder / "run/costs-0.jsonl", *(folder / "run/at-images").glob("*/costs-0.jsonl")]
        rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        assert audited[0].metrics["wall_seconds"]["total"] == pytest.approx(sum(row["seconds"] for row in rows))
        assert audited[0].metrics["num_products"] == sum(row["products"] for row in rows)
        assert len(files) == 3


@pytest.mark.usefixtures("unchecked")
class TestTypes:
    @pytest.mark.parametrize(
        ("given", "match"),
        [
            (dict(images="data"), "images: expected what `jaxmem.read_training_images` gives, got str"),
            (dict(held_out="data"), "held_out: expected what .*, got str"),
            (dict(descriptor="x.onnx"), "descriptor: expected what .*, got str"),
            (dict(image_timesteps=301), "image_timesteps: expected a list of timesteps, got int"),
            (dict(show="no"), "show: expected True or False, got str"),
        ],
    )
    def test_another_kind_of_value_is_refused_at_once(self, training, given, match):
        with pytest.raises(ValueError, match=match):
            replace(training, **given)

    def test_images_alone_are_no_training_data(self, model, training, tmp_path):
        with pytest.raises(ValueError, match=r"training: expected a jaxmem\.TrainingData, got TrainingImages"):
            jm.audit(model, config=CONFIG, folder=tmp_path / "run", training=training.images)


class TestRefusals:
    def test_a_held_out_image_that_is_a_training_image(self, model, tmp_path):
        single = single_pictures()
        data = _training(tmp_path, single, SINGLE, (single[:1], [MANY]))
        with pytest.raises(ValueError, match=r"held_out: expected images that are not .*000.png as 000.png"):
            jm.audit(model, config=CONFIG, folder=tmp_path / "run", training=data)
        assert not (tmp_path / "run").exists()

    def test_a_caption_that_the_model_does_not_know(self, model, tmp_path):
        data = _training(tmp_path, single_pictures(), ["first", "second", "unknown"])
        with pytest.raises(ValueError, match="unknown"):
            jm.audit(model, ["first"], CONFIG, folder=tmp_path / "run", training=data)

    def test_a_timestep_that_no_step_visits(self, model, tmp_path):
        data = _training(tmp_path, single_pictures(), SINGLE, image_timesteps=(252,))
        with pytest.raises(ValueError, match=r"image_timesteps: expected ones of the sampler .* nearest is 250"):
            jm.audit(model, config=CONFIG, folder=tmp_path / "run", training=data)
