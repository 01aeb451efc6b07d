"""Models of one's own: the example of the protocol, classes and no condition audited; samples and Hessians of any."""

import inspect
import subprocess
import sys
import textwrap
from functools import partial
from html import unescape

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import command_environment
from flax import nnx

import jaxmem
from jaxmem.audit import audit, read_audit
from jaxmem.config import AuditConfig
from jaxmem.data import verbatim_model
from jaxmem.detectors import Detector, EpsDifferences, ScorePairs
from jaxmem.diffusion import NoiseSchedule
from jaxmem.model import Model, fingerprint
from jaxmem.networks.unet import UNet
from jaxmem.oracles import GaussianMixture, GaussianMixtureScore
from jaxmem.pictures import to_pictures
from jaxmem.prompts import NO_PROMPT
from jaxmem.report.audit.page import write_report
from jaxmem.runs.directory import Run
from jaxmem.runs.functions import captured
from jaxmem.sampling import sample_path
from jaxmem.score import ScorePair, bind
from jaxmem.score_models import ClassConditional, Unconditional

SCHEDULE = NoiseSchedule()
CONFIG = AuditConfig(noises=2, ddim_steps=5, timesteps=(800, 200), directions=1)


def network(num_classes):
    """A small U-Net with random output: one that is new puts out nothing."""
    module = UNet((8, 8, 1), num_classes=num_classes, features=(8,), num_blocks=(1,), embedding=16, rngs=nnx.Rngs(0))
    module.out.kernel.set_value(0.1 * jax.random.normal(jax.random.key(1), module.out.kernel.shape))
    return bind(module, SCHEDULE, "eps")


@pytest.fixture(scope="module")
def classes():
    return ClassConditional(*network(3), SCHEDULE, (8, 8, 1), {"a": 0, "c": 2}, "eps")


@pytest.fixture(scope="module")
def unconditional():
    return Unconditional(*network(0), SCHEDULE, (8, 8, 1), "eps")


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """What the example of the protocol leaves behind: its names, and the folder it ran in."""
    code = textwrap.dedent(inspect.getdoc(Model).partition("::\n")[2])
    assert len(code.strip().splitlines()) <= 30
    folder = tmp_path_factory.mktemp("example")
    left = {"__name__": "example"}
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        exec(code, left)
    return left, folder / "runs/two-kinds"


class TestExample:
    def test_the_copy_has_no_free_direction(self, example):
        left, _ = example
        np.testing.assert_array_equal(left["found"]["tangent-count@t50"].scores, [[0, 0], [16, 16]])

    def test_spectra_are_those_of_the_closed_form(self, example):
        """One Gaussian per prompt: -1 / (alpha² variance + sigma²), sixteen times, whatever the point."""
        found, t = example[0]["found"], 50
        for i, variance in enumerate((0.0, 0.1)):
            exact = -1 / (SCHEDULE.alpha[t] ** 2 * variance + SCHEDULE.sigma[t] ** 2)
            # float32 products of numbers up to 1/sigma² = 300; 16 of them
            np.testing.assert_allclose(found.eigenvalues[i, :, 0], exact, rtol=1e-5)

    def test_a_prompt_that_it_does_not_know_is_named(self, example, tmp_path):
        with pytest.raises(ValueError, match=r"prompts: expected copied, varied or none, got \{'a cat'}"):
            audit(example[0]["TwoKinds"](), ["a cat"], CONFIG, folder=tmp_path / "run")

    def test_pairs_are_compared(self, example):
        """Wen's distance at the first step: the scores of a Gaussian and of the mixture of both, in float64."""
        found = example[0]["found"]
        t = int(found.timesteps[0])
        alpha, sigma = SCHEDULE.alpha[t], SCHEDULE.sigma[t]
        for j in range(2):
            x = np.asarray(jax.random.normal(jax.random.fold_in(jax.random.key(0), j), (16,)), np.float64)
            spread = alpha**2 * np.array([0.0, 0.1]) + sigma**2
            offset = x - alpha * np.array([[0.5], [-0.5]])
            logits = -0.5 * (offset**2).sum(1) / spread - 8 * np.log(spread)
            weights = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            scores = -offset / spread[:, None]
            for i in range(2):
                expected = sigma * np.linalg.norm(scores[i] - weights @ scores)
                assert found["wen-1"].scores[i, j] == pytest.approx(expected, rel=1e-3)

    def test_its_page_speaks_of_classes(self, example):
        page = write_report(example[1]).read_text()
        assert "Which of 2 classes has this class-conditional model memorized?" in page
        assert "On classes whose answer is known" not in page  # they have no labels
        text = page.partition("<h2>Summary</h2>")[2].partition('<section id="groups">')[0]
        assert "prompt" not in text.replace('class="prompt"', "")


@pytest.fixture(scope="module")
def runs(classes, unconditional, tmp_path_factory):
    folder, said = tmp_path_factory.mktemp("runs"), []
    for name, model in (("classes", classes), ("none", unconditional)):
        audit(model, None, CONFIG, folder=folder / name, say=said.append)
    return {name: read_audit(folder / name) for name in ("classes", "none")}, said, folder


def test_reading_an_audit_and_writing_its_page_loads_no_jax(example, tmp_path):
    """And no networks: what is drawn lies in files."""
    script = (
        "import sys, jaxmem; found = jaxmem.read_audit(sys.argv[1]); found.write_page(sys.argv[2]);"
        " print(*[name for name in ('jax', 'jaxlib', 'flax', 'transformers') if name in sys.modules])"
    )
    page = tmp_path / "page.html"
    done = subprocess.run(
        [sys.executable, "-c", script, str(example[1]), str(page)],
        env=command_environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == ""
    assert "Which of 2 classes has this class-conditional model memorized?" in page.read_text()


class TestWithoutPairs:
    def test_only_what_needs_no_pair_is_there(self, runs):
        results, said, _ = runs
        for result in results.values():
            kinds = {detector.statistic for detector in result.detectors}
            assert not kinds & {"wen", "jeon", "score-evolution", "anisotropy"}
            assert {"tiled-l2", "positive-count", "tangent-count", "trace"} <= kinds
            assert not np.isnan(result.scores).any()
            assert np.isnan(result.eps_difference).all()
        left_out = "left out: wen-1, wen-5, wen-all, jeon, score-evolution, anisotropy, which compare scores with and"
        assert sum(line.startswith(left_out) for line in said) == 2
        assert [prompt.text for prompt in results["classes"].prompts] == ["a", "c"]
        assert results["none"].prompts == [NO_PROMPT]

    def test_spectra_and_pictures_are_those_of_the_sampling_path(self, runs, classes, unconditional):
        for name, model in (("classes", classes), ("none", unconditional)):
            result, cond = runs[0][name], (2 if name == "classes" else None)
            noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), 1), (8, 8, 1))
            kept = dict(
                sample_path(
                    model.score,
                    model.state,
                    noise[None],
                    None if cond is None else jnp.array([cond]),
                    sampler=model.sampler(5),
                )
            )
            for k, t in enumerate((800, 200)):
                score = partial(model.score, model.state, t=t, cond=cond)
                matrix = jax.jacfwd(score)(kept[t][0]).reshape(64, 64)
                exact = np.linalg.eigvalsh(np.asarray(matrix + matrix.T, np.float64) / 2)[::-1]
                # x_t differs by float32 rounding over the steps before
                np.testing.assert_allclose(result.eigenvalues[-1, 1, k], exact, atol=1e-4 * np.abs(exact).max())
            picture = result.images[-1, 1].astype(int)
            assert np.abs(picture - to_pictures(kept[-1])[0]).max() <= 1
            assert (picture[..., :1] == picture).all()

    def test_costs_are_of_one_score_per_step(self, runs):
        for name, points in (("classes", 4), ("none", 2)):
            result = runs[0][name]
            costs = {row["detector"]: row for row in result.costs}
            assert costs["tiled-l2"]["evaluations"] == points * 5
            assert costs["trace@t200"]["evaluations"] == points * (3 + 1)
            # sampling, spectra, directions
            assert result.metrics["num_evaluations"] == points * 5 + 2 * points + 2 * 4

    def test_the_page_says_what_was_left_out_and_has_the_right_words(self, runs):
        pages = {name: unescape(write_report(runs[2] / name).read_text()) for name in ("classes", "none")}
        for page in pages.values():
            assert "the measures that compare the two scores are left out" in page
            assert page.count("data:image/") > 4
        assert "Which of 2 classes has this class-conditional model memorized?" in pages["classes"]
        assert "Has this unconditional model memorized?" in pages["none"]
        assert "An unconditional model was sampled from 2 random starting points." in pages["none"]

    def test_a_run_goes_on_with_the_same_model_only(self, runs, classes, tmp_path):
        again = audit(classes, None, CONFIG, folder=runs[2] / "classes")
        assert again.metrics == Run.read(runs[2] / "classes").metrics()
        state = jax.tree.map(lambda leaf: leaf + 1e-3, classes.state)
        other = ClassConditional(classes.score, state, SCHEDULE, (8, 8, 1), classes.classes, "eps")
        with pytest.raises(ValueError, match=r"model\.sha256: there"):
            audit(other, None, CONFIG, folder=runs[2] / "classes")

    @pytest.mark.parametrize(
        ("prompts", "changes", "match"),
        [
            (
                None,
                dict(guidance=7.5),
                "guidance: expected 1, which is none, for a model without an unconditional score",
            ),
            (
                None,
                dict(method="none", timesteps=(), directions=0, noises=1),
                "method: expected spectra of a model without an unconditional score, got 'none' and nothing else",
            ),
            (["b"], {}, r"prompts: expected names of the classes of this model \('a', 'c'\), got 'b'"),
        ],
    )
    def test_what_the_model_cannot_do_is_said_before_any_work(self, classes, tmp_path, prompts, changes, match):
        with pytest.raises(ValueError, match=match):
            audit(classes, prompts, AuditConfig(**{**CONFIG.__dict__, **changes}), folder=tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_neutral_prompts_that_the_model_does_not_know_are_named_so(self, classes, tmp_path):
        with pytest.raises(ValueError, match=r"neutral: expected names of the classes of this model .* got 'a cat'"):
            audit(classes, ["a"], CONFIG, folder=tmp_path / "run", neutral=["a cat"])
        with pytest.raises(ValueError, match=r"prompts: expected names of the classes of this model .* got 'b'"):
            audit(classes, ["b"], CONFIG, folder=tmp_path / "run", neutral=["c"])
        assert not (tmp_path / "run").exists()

    def test_samples_that_are_no_pictures_are_refused_before_sampling(self, tmp_path):
        model = Unconditional(lambda state, x, t, cond: -x, {}, SCHEDULE, (4,))
        with pytest.raises(ValueError, match=r"decode: expected samples of shape .* got \(4,\); give the model a"):
            audit(model, None, AuditConfig(noises=2, ddim_steps=5), folder=tmp_path / "run")
        assert not (tmp_path / "run").exists()
        config = AuditConfig(noises=2, ddim_steps=5, steps_run=2, directions=0)  # needs no picture
        assert audit(model, None, config, folder=tmp_path / "run").images is None

    def test_a_model_without_its_attributes_is_refused(self, tmp_path):
        class Empty(Model):
            schedule = SCHEDULE

            def conditions(self, prompts):
                return None

        with pytest.raises(ValueError, match=r"got a Empty without score, state, shape; see jaxmem\.Model"):
            audit(Empty(), ["a"], CONFIG, folder=tmp_path / "run")

    def test_an_unconditional_model_has_one_prompt(self, unconditional, tmp_path):
        with pytest.raises(ValueError, match="prompts: expected the empty one alone, as this model has no condition"):
            audit(unconditional, ["a cat"], CONFIG, folder=tmp_path / "run")

    def test_a_wrong_prediction_is_noticed(self, classes, tmp_path):
        """The U-Net puts out the noise, and is said to put out v."""
        score, state = network(3)
        wrong = ClassConditional(
            type(score)(score.graphdef, SCHEDULE, "v"), state, SCHEDULE, (8, 8, 1), {"a": 0}, prediction="v"
        )
        said = []
        config = AuditConfig(noises=2, ddim_steps=50, steps_run=1)
        (warning,) = audit(wrong, None, config, folder=tmp_path / "run", say=said.append).warnings
        assert warning.startswith("prediction: the model says 'v', but at the first step its output holds")
        assert said[-1] == f"warning: {warning}"

    @pytest.mark.usefixtures("unchecked")
    def test_what_is_no_model_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"model: expected a jaxmem\.Model such as .* gives, got str"):
            audit("runs/mnist", ["a"], CONFIG, folder=tmp_path / "run")

    def test_parameters_that_are_not_finite_are_named(self, classes, tmp_path):
        state = jax.tree.map(lambda leaf: leaf, classes.state)
        state["stem"]["kernel"].set_value(state["stem"]["kernel"].get_value().at[0, 0].set(jnp.nan))
        bad = ClassConditional(classes.score, state, SCHEDULE, (8, 8, 1), {"a": 0})
        with pytest.raises(ValueError, match=r"model: expected finite parameters, got NaN or infinity in \['stem'\]"):
            audit(bad, None, CONFIG, folder=tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_copies_among_the_samples_of_an_unconditional_model_are_told(tmp_path):
    """A density of one repeated picture and of a Gaussian: which of the two a sample is of, its noise decides."""
    means, variances = jnp.outer(jnp.array([0.5, -0.5]), jnp.ones(16)), jnp.array([0.0, 0.1])
    state = GaussianMixture(jnp.zeros(2), means, jnp.zeros((2, 16, 1)), variances)
    exact = GaussianMixtureScore(SCHEDULE)
    model = Unconditional(lambda s, x, t, _: exact(s, x.ravel(), t).reshape(x.shape), state, SCHEDULE, (4, 4, 1))
    found = audit(model, None, AuditConfig(noises=12, ddim_steps=20, timesteps=(50,)), folder=tmp_path / "run")
    # a copy ends at 0.5 in every pixel; 16 pixels of the Gaussian never do so
    ends = found.images[0, ..., 0].astype(float) / 127.5 - 1
    copies = int((np.abs(ends - 0.5).max((1, 2)) < 0.1).sum())
    assert 0 < copies < 12
    assert sorted(set(found["tangent-count@t50"].scores[0])) == [0, 16]
    page = " ".join(unescape(found.write_page(tmp_path / "page.html").read_text()).split())
    assert f"<strong>{copies} of 12 samples</strong> leave the model <strong>no freedom</strong>" in page
    assert "The model has some freedom" not in page


def first_norm(norms):
    return norms[0]


def mine(**changes):
    """An entry of one's own, with the norm of the first score difference."""
    words = dict(name="mine", title="Mine", formula="x", source="this test", memorized_is="high")
    return Detector(**words | dict(needs=EpsDifferences(1), score=first_norm) | changes)


SHORT = AuditConfig(noises=2, ddim_steps=3, method="none")


class TestDetectorsOfOnesOwn:
    def test_another_entry_of_the_same_name_is_refused(self, example, tmp_path):
        model, folder = example[0]["TwoKinds"](), tmp_path / "run"
        found = audit(model, ["copied", "varied"], SHORT, folder=folder, detectors=[mine()])
        # without labels nothing is evaluated
        assert found["mine"].evaluation.auc is None
        assert found["mine"].evaluations["all"].num_positive == 0
        again = audit(model, ["copied", "varied"], SHORT, folder=folder, detectors=[mine()])
        np.testing.assert_array_equal(again.scores, found.scores)
        for other in (mine(score=lambda norms: -norms[0]), mine(needs=EpsDifferences(2)), mine(memorized_is="low")):
            with pytest.raises(ValueError, match=r"evidence\.mine: there"):
                audit(model, ["copied", "varied"], SHORT, folder=folder, detectors=[other])
            with pytest.raises(ValueError, match=r"for the detector 'mine', got .*; register the entry that ran"):
                read_audit(folder, [other])

    def test_a_wrong_shape_is_refused_before_it_is_kept(self, example, tmp_path):
        """The corrected score continues the run: what was computed before stays."""
        model, folder = example[0]["TwoKinds"](), tmp_path / "run"

        def of_each_step(pairs):
            return jnp.abs(pairs.cond).sum((1, 2, 3))

        def corrected(pairs):
            return jnp.abs(pairs.cond).sum()

        corrected.__qualname__ = of_each_step.__qualname__
        wrong = mine(needs=ScorePairs(2), score=of_each_step)
        with pytest.raises(ValueError, match=r"one number for each point from the score of 'mine', got .* \(2,\)"):
            audit(model, ["copied", "varied"], SHORT, folder=folder, detectors=[wrong])
        assert not any(row["key"].startswith("path") for row in Run.read(folder).rows())
        right = mine(needs=ScorePairs(2), score=corrected)
        found = audit(model, ["copied", "varied"], SHORT, folder=folder, detectors=[right])
        assert (found["mine"].scores > 0).all()

    def test_a_wrong_shape_of_what_is_scored_at_the_end_too(self, example, tmp_path):
        def one(norms):
            return norms[:1]

        model, folder = example[0]["TwoKinds"](), tmp_path / "run"
        with pytest.raises(ValueError, match=r"from the score of 'mine' finite numbers of shape \(\), or NaN, got \["):
            audit(model, ["copied", "varied"], SHORT, folder=folder, detectors=[mine(score=one)])
        rows = len(Run.read(folder).rows())

        def corrected(norms):
            return norms[0]

        corrected.__qualname__ = one.__qualname__
        found = audit(model, ["copied", "varied"], SHORT, folder=folder, detectors=[mine(score=corrected)])
        np.testing.assert_array_equal(found["mine"].scores, found.eps_difference[..., 0])
        assert len(Run.read(folder).rows()) == rows


def test_conditions_of_another_number_of_prompts_are_refused(example, tmp_path):
    class Short(example[0]["TwoKinds"]):
        def conditions(self, prompts):
            return super().conditions(prompts)[:-1]

    with pytest.raises(ValueError, match=r"`conditions` of 3 prompts with 3 as leading axis, got shape \(2, 2\)"):
        audit(Short(), ["copied", "varied"], SHORT, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def gaussian(variance, *, scale=1.0, decode=to_pictures):
    """A Gaussian whose variance is in the closure of its score, with a default that scales it."""
    alpha, sigma = jnp.asarray(SCHEDULE.alpha), jnp.asarray(SCHEDULE.sigma)

    def score(state, x, t, cond, scale=scale):
        return -scale * (x - state) / (alpha[t] ** 2 * variance + sigma[t] ** 2)

    class Gaussian(Unconditional):
        def decode(self, x):
            return decode(x)

    return Gaussian(score, jnp.zeros(()), SCHEDULE, (4, 4, 1))


def upside_down(x):
    return to_pictures(x)[:, ::-1]


class TestIdentity:
    def test_what_a_closure_holds_is_of_the_model(self, tmp_path):
        audit(gaussian(0.5), None, SHORT, folder=tmp_path / "run")
        audit(gaussian(0.5), None, SHORT, folder=tmp_path / "run")  # another closure of equal values
        for other in (gaussian(0.25), gaussian(np.full((4, 4, 1), 0.5)), gaussian(0.5, scale=2.0)):
            with pytest.raises(ValueError, match=r"model\.score_sha256: there"):
                audit(other, None, SHORT, folder=tmp_path / "run")
        with pytest.raises(ValueError, match=r"model\.decode_sha256: there"):
            audit(gaussian(0.5, decode=upside_down), None, SHORT, folder=tmp_path / "run")

    def test_the_way_to_pictures_and_the_absence_of_a_prompt_are_too(self, example):
        kinds = example[0]["TwoKinds"]

        class OtherWay(kinds):
            def decode(self, x):
                return upside_down(x)

        class OtherAbsence(kinds):
            log_weights = kinds.log_weights | {"": (0.0, -1.0)}

        def changed(model):
            before, now = (one().identity(["copied"]) for one in (kinds, model))
            return {name for name in before if before[name] != now[name]}

        assert changed(kinds) == set()
        assert changed(OtherWay) - {"decode_sha256"} == {"decode"}  # the type checks of the tests carry something
        assert changed(OtherAbsence) == {"conditions_sha256"}

    def test_everything_that_a_function_carries(self):
        def carrying(value):
            return lambda x: value

        def inner(value):
            return lambda x: x + value

        @jax.tree_util.register_pytree_node_class
        class Scaled:  # as modules of networks are: called, and a pytree
            def __init__(self, scale):
                self.scale = scale

            def __call__(self, x):
                return self.scale * x

            def tree_flatten(self):
                return (self.scale,), None

            @classmethod
            def tree_unflatten(cls, _, leaves):
                return cls(*leaves)

        values = [
            1, 1.5, "a", None, np.ones(2), np.zeros(2), jnp.zeros(2), jax.random.key(0), jax.random.key(1),
            [1, 2], {"a": np.ones(3)}, {"a": np.zeros(3)}, jnp, inner(1), inner(2), partial(inner, 1),
            partial(inner, 2), jax.jit(inner(3)), jax.jit(inner(4)), SCHEDULE, NoiseSchedule(beta_end=0.011),
            Scaled(1.0), Scaled(2.0), object(),
        ]  # fmt: skip
        hashes = [captured(carrying(value)) for value in values]
        assert len(set(hashes)) == len(values)
        assert captured(carrying(object())) == hashes[-1]  # known by its class
        assert captured(carrying({"a": np.ones(3)})) == hashes[10]
        assert captured(carrying(inner(1))) == hashes[13]

        def itself(x):
            return itself(x)

        assert captured(itself) == captured(itself)


class TestSampling:
    def test_samples_are_the_ends_of_the_path(self, classes, getkey):
        key = getkey()
        noise = jnp.stack([jax.random.normal(jax.random.fold_in(key, i), (8, 8, 1)) for i in range(2)])
        path = dict(sample_path(classes.score, classes.state, noise, jnp.array([2, 0]), sampler=classes.sampler(5)))
        np.testing.assert_array_equal(classes.sample(["c", "a"], key=key, num_steps=5), path[-1])
        np.testing.assert_array_equal(classes.sample(["c", "a"], key=key, num_steps=5, until=400), path[400])

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            (dict(until=401), "until: expected a timestep that 5 steps visit, got 401; the nearest is 400"),
            (dict(guidance=2.0), "guidance: expected 1, which is none, for a model without an unconditional score"),
        ],
    )
    def test_bad_options_are_named(self, classes, getkey, options, match):
        with pytest.raises(ValueError, match=match):
            classes.sample(["a"], key=getkey(), num_steps=5, **options)

    def test_guidance_is_of_the_pair(self, example, getkey):
        model, key = example[0]["TwoKinds"](), getkey()
        x = model.sample(["copied"], key=key, until=980)[0]
        then = model.sample(["copied"], key=key, until=960, guidance=3.0)[0]
        pair = ScorePair(*(model.score(model.state, x, 980, cond) for cond in model.conditions(["copied", ""])))
        alpha, sigma = SCHEDULE.alpha, SCHEDULE.sigma
        eps = -sigma[980] * pair.guided(3.0)
        expected = alpha[960] * (x - sigma[980] * eps) / alpha[980] + sigma[960] * eps
        np.testing.assert_allclose(then, expected, rtol=1e-4, atol=1e-5)  # alpha is 0.007: x_0 is of size 100

    def test_hessians(self, classes, unconditional, getkey):
        x = jax.random.normal(getkey(), (8, 8, 1))
        for model, prompt, cond in ((classes, "c", 2), (unconditional, None, None)):
            exact = jax.jacfwd(lambda x, m=model, c=cond: m.score(m.state, x, 300, c))(x).reshape(64, 64)
            np.testing.assert_allclose(
                model.hessian(x, 300, prompt).to_dense(), exact, atol=1e-5 * jnp.abs(exact).max()
            )
        with pytest.raises(ValueError, match="prompts: expected names of the classes"):
            classes.hessian(x, 300)
        with pytest.raises(ValueError, match=r"x: expected one point of shape \(8, 8, 1\), got \(64,\)"):
            classes.hessian(x.ravel(), 300, "a")
        with pytest.raises(ValueError, match="t: expected 0 to 999"):
            classes.hessian(x, 1000, "a")


def test_stable_diffusion_samples_and_has_hessians(getkey):
    model, key = jaxmem.StableDiffusion.load(verbatim_model()[0]), getkey()
    prompt = "the azure orchard"
    x = model.sample([prompt], key=key, until=801, num_steps=5, guidance=2.0)[0]
    noise = jax.random.normal(jax.random.fold_in(key, 0), model.shape)[None]
    np.testing.assert_array_equal(dict(model.path(noise, [prompt], num_steps=5, guidance=2.0))[801][0], x)
    vector = jax.random.normal(getkey(), model.shape)
    for given, text in ((prompt, prompt), (None, "")):
        cond = model.embed([text])[0]
        with jax.default_matmul_precision("highest"):
            _, expected = jax.jvp(lambda x, c=cond: model.score(model.state, x, 801, c), (x,), (vector,))
        found = model.hessian(x, 801, given).mv(vector.ravel())
        np.testing.assert_allclose(found, expected.ravel(), atol=1e-4 * np.abs(expected).max())


class TestPieces:
    def test_pictures(self):
        x = np.array([-2.0, -1.0, 0.0, 1.0]).reshape(1, 2, 2)
        grey = to_pictures(x)
        assert grey.shape == (1, 2, 2, 3)
        assert grey.dtype == np.uint8
        np.testing.assert_array_equal(grey[0, ..., 1], [[0, 0], [128, 255]])
        np.testing.assert_array_equal(to_pictures(x[..., None]), grey)
        with pytest.raises(ValueError, match=r"decode: expected samples of shape .* got \(4,\); give the model a"):
            to_pictures(np.zeros((2, 4)))

    def test_fingerprints_see_names_shapes_and_values(self):
        tree = {"a": np.zeros((2, 3)), "b": np.ones(2)}
        others = [
            {"a": np.zeros((3, 2)), "b": np.ones(2)},
            {"a": np.zeros((2, 3)), "c": np.ones(2)},
            {"a": np.zeros((2, 3)), "b": np.array([1.0, 2.0])},
            {"a": np.zeros((2, 3), np.float32), "b": np.ones(2)},
        ]
        assert fingerprint({"b": np.ones(2), "a": np.zeros((2, 3))}) == fingerprint(tree)
        assert len({fingerprint(one) for one in (tree, *others)}) == 5

    def test_a_model_of_no_class_is_refused(self):
        with pytest.raises(ValueError, match="classes: expected a name and an index of at least one class, got none"):
            ClassConditional(*network(3), SCHEDULE, (8, 8, 1), {})
