"""Entries of detectors: what each kind of audit can run, and the table of scores against formulas on small arrays."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from jaxmem import detectors
from jaxmem.audit.plan import Plan
from jaxmem.audit.scores import Kept, compute_scores
from jaxmem.detectors import Detector, Setting, choose, columns, registered, require_evidence, table
from jaxmem.detectors.entry import _registered

OF_SCORES = ["wen-1", "wen-5", "wen-all", "jeon", "score-evolution", "anisotropy", "tiled-l2"]
OF_SPECTRA = ["positive-count", "tangent-count", "largest-sum", "largest", "smallest", "trace", "cubed-trace"]
OF_SPECTRA += ["spectral-gap"]
DDIM = tuple(range(981, 0, -20))


def names(**setting: Any) -> list[str]:
    setting = {"timesteps": DDIM, "sampler_timesteps": DDIM, "num_eigenvalues": 64} | setting
    return [one.name for one in columns(registered(), Setting(**setting))]


def test_what_each_kind_of_audit_can_run():
    whole = names(spectral_timesteps=(981, 281), method="eigh", noises=4, with_images=True, image_sides=(8, 8))
    assert whole == OF_SCORES + [f"{name}@t{t}" for t in (981, 281) for name in OF_SPECTRA]
    assert names(timesteps=DDIM[:1]) == ["wen-1", "jeon", "anisotropy"]
    assert names(timesteps=DDIM[:1], sampler_timesteps=DDIM[:2]) == ["wen-1", "jeon"]
    four = names(timesteps=DDIM[:4], noises=2, with_images=True)
    assert four == ["wen-1", "wen-all", "jeon", "score-evolution", "anisotropy", "tiled-l2"]
    assert names(timesteps=DDIM[:5])[:3] == ["wen-1", "wen-5", "jeon"]  # all are five
    for images in (dict(noises=1), dict(with_images=False), dict(image_sides=(8, 6))):
        assert "tiled-l2" not in names(**{"noises": 2, "with_images": True} | images)
    # Ritz values of some steps tell the ends of the spectrum; counts come only with `count_positive`
    few = dict(timesteps=DDIM[:1], spectral_timesteps=(981,), method="lanczos")
    ends = ["largest-sum@t981", "largest@t981", "smallest@t981"]
    assert names(**few)[3:] == ends
    assert names(count_products=40, **few)[3:] == ["positive-count@t981", "tangent-count@t981", *ends]
    assert names(**few | {"method": "none"}, count_products=40)[3:] == ["positive-count@t981", "tangent-count@t981"]
    # of a model without a score beside that of the condition, what looks at spectra and images is left
    spectra = dict(spectral_timesteps=(981,), method="eigh", noises=2, with_images=True)
    assert names(has_pairs=False, **spectra) == ["tiled-l2", *(f"{name}@t981" for name in OF_SPECTRA)]


def test_every_detector_says_what_it_is():
    setting = Setting(DDIM, DDIM, (981, 281), "eigh", 64, noises=4, with_images=True)
    found = columns(registered(), setting)
    assert len({one.name for one in found}) == len({one.title for one in found}) == len(found)
    for one in found:
        assert one.formula
        assert one.source
        assert not re.search(r"\{\w+\}", one.title + one.formula)
    by_name = {one.name: one for one in found}
    assert [name for name, one in by_name.items() if not one.on_trajectory] == ["anisotropy"]
    assert [name for name, one in by_name.items() if one.is_count and one.timestep == 281] == [
        "positive-count@t281",
        "tangent-count@t281",
        "spectral-gap@t281",
    ]
    assert by_name["largest-sum@t281"].formula == "λ₁ + … + λ_5"
    assert by_name["largest-sum@t281"].title == "Sum of the 5 largest eigenvalues, t = 281"
    assert by_name["wen-all"].title == "Score difference, all 50 steps"
    assert by_name["anisotropy"].formula.startswith("1 ‖ε_c - ε_u‖₂(x_T, t₀) + 2 mean cos")
    (weighted,) = columns(choose(["anisotropy"]), setting._replace(prediction="v"))
    assert weighted.formula.startswith("1 ‖ε_c - ε_u‖₂(x_T, t₀) + 0.1 mean cos")
    assert [by_name[name].memorized_is for name in OF_SCORES] == ["high"] * 6 + ["low"]
    assert [by_name[f"{name}@t281"].memorized_is for name in OF_SPECTRA] == ["low"] * 6 + ["high", "low"]
    estimated = columns(choose(["positive-count"]), setting._replace(estimates_counts=True, count_products=40))
    assert estimated[0].title == "Positive eigenvalues (estimate), t = 981"


def test_the_table_for_documentation_has_every_entry():
    rows = table()
    assert [row["name"] for row in rows] == [*OF_SCORES, *OF_SPECTRA, "denoising-error", "denoising-gain"]
    by_name = {row["name"]: row for row in rows}
    assert by_name["jeon"]["products"] == "2"
    assert by_name["jeon"]["needs"] == "products of both Hessians with the score difference at the first step"
    assert by_name["trace"]["title"] == "Trace"
    assert by_name["wen-5"]["products"] == "none"


MINE: dict[str, Any] = dict(
    name="mine", title="Mine", formula="x", source="me", memorized_is="low", needs=detectors.Images(), score=len
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(name="two words"), r"name: expected letters, digits and \. _ \+ - \(at most 61\), got 'two words'"),
        (dict(name="a@t1"), "name: expected letters"),
        (dict(name="prompt"), r"name: expected none of prompt, .* \(columns of results\.csv\), got 'prompt'"),
        (dict(memorized_is="up"), "memorized_is: expected 'high' or 'low', got 'up'"),
        (dict(needs="images"), r"needs: expected a kind of evidence, such as Images\(fewest=2\), got 'images'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_impossible_entries_are_refused(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Detector(**MINE | change)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (detectors.ScorePairs, 0, "steps: expected 1 to 10, got 0"),  # those of a unit of work
        (detectors.ScorePairs, 11, "steps: expected 1 to 10, got 11"),
        (detectors.ScorePairs, 2.5, "steps: expected a whole number, got 2.5"),
        (detectors.EpsDifferences, 0, "steps: expected at least 1, got 0"),
        (detectors.EpsDifferences, -1, "steps: expected at least 1, got -1"),
        (detectors.Images, 0, "fewest: expected at least 1, got 0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_impossible_evidence_is_refused(kind: Any, value: Any, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(value)


def test_one_name_is_one_detector(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jaxmem.detectors.entry._registered", dict(_registered))
    mine = Detector(**MINE)
    assert detectors.register(mine) is detectors.register(mine) is registered()[-1]
    with pytest.raises(ValueError, match="name: expected one that no other detector has, got 'mine'"):
        detectors.register(replace(mine, title="Another"))
    assert choose(["jeon", "mine", mine])[1:] == (mine,)
    with pytest.raises(ValueError, match="detectors: expected names that differ, got two detectors called 'jeon'"):
        choose(["jeon", replace(mine, name="jeon")])
    with pytest.raises(ValueError, match=r"whose name no registered detector has, got 'jeon'; choose another name"):
        choose([replace(mine, name="jeon")])
    with pytest.raises(ValueError, match="detectors: expected at least one, got none"):
        choose([])
    with pytest.raises(ValueError, match=r"detectors: expected some of wen-1, .*, mine, got 'jean'; .*register` makes"):
        choose(["jean"])
    with pytest.raises(ValueError, match=r"detectors: expected a list of names or of Detector objects, got 'jeon'"):
        choose("jeon")


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("score-evolution", Setting(DDIM[:2]), "'score-evolution' needs at least 3 sampling steps, got 2"),
        ("anisotropy", Setting(DDIM[:1], DDIM[:1]), "'anisotropy' needs at least a sampler of at least 3 steps, got 1"),
        ("tiled-l2", Setting(DDIM), "'tiled-l2' needs at least 2 noises per prompt, got 1"),
        ("tiled-l2", Setting(DDIM, noises=2), "'tiled-l2' needs at least images, so all steps of the sampler"),
        ("trace", Setting(DDIM, method="lanczos"), "'trace' needs at least spectra of method 'eigh', got .* 'lanczos'"),
        ("largest", Setting(DDIM), "'largest' needs at least spectra of method 'eigh' or 'lanczos', got method 'none'"),
        ("tangent-count", Setting(DDIM), "'tangent-count' needs at least spectra of method 'eigh' or counts, got"),
        ("jeon", Setting(DDIM, has_pairs=False), "'jeon' needs at least a score without the prompt, which this model"),
    ],
)
def test_detectors_without_their_evidence_are_refused(name: str, setting: Setting, message: str):
    require_evidence(choose(["wen-1"]), Setting(DDIM))
    with pytest.raises(ValueError, match=f"detectors: {message}"):
        require_evidence(choose([name]), setting)


PLAN = Plan(
    num_prompts=2, num_reference=1, noises=2, batch=6, ddim_steps=6, guidance=1.0,
    timesteps=(981, 801, 601, 401, 201, 1), sigma=(0.99, 0.9, 0.8, 0.7, 0.6, 0.5), spectral_timesteps=(981, 1),
    sampler_timesteps=(981, 801, 601, 401, 201, 1), method="eigh", num_steps=5, count_budget=None, directions=0,
    latent_shape=(1, 1, 5),
)  # fmt: skip


@pytest.fixture
def kept() -> Kept:
    """Three prompts, two noises, six steps, two spectra of five eigenvalues; the last point is not done."""
    rng = np.random.default_rng(0)
    values = -np.sort(-rng.normal(size=(6, 2, 5)))
    values[0, 1] = [4.0, 1e-3, 0.0, -1.0, -8.0]
    noise, eps = np.full((6, 2), 1e-2), rng.uniform(1, 2, (6, 6))
    values[5], noise[5], eps[5, 1:] = np.nan, np.nan, np.nan
    sampled = np.ones(6, bool)
    sampled[5] = False
    return _with_counts(
        Kept(
            eps_difference=eps,
            eigenvalues=values,
            noise=noise,
            counts={},
            errors=np.full((6, 6, 2), np.nan),
            images=rng.integers(0, 256, (6, 8, 8, 3), np.uint8),
            sampled=sampled,
            scores={name: rng.normal(size=6) for name in ("jeon", "score-evolution", "anisotropy")},
        )
    )


def _with_counts(kept: Kept) -> Kept:
    from jaxmem.audit.scores import _exact_counts

    return kept._replace(counts=_exact_counts(PLAN, kept.eigenvalues, kept.noise))


def test_the_table_follows_the_formulas(kept: Kept):
    found = compute_scores(PLAN, kept, registered())
    assert found.values.shape == (6, len(found.detectors))
    assert found.intervals == {}
    column = {one.name: found.values[:, i] for i, one in enumerate(found.detectors)}
    eps, values = kept.eps_difference, kept.eigenvalues[:, 1]
    np.testing.assert_array_equal(column["wen-1"], eps[:, 0])
    np.testing.assert_allclose(column["wen-5"], eps[:, :5].sum(-1) / 5, rtol=1e-15)
    np.testing.assert_allclose(column["wen-all"], eps.sum(-1) / 6, rtol=1e-15)
    for name, given in kept.scores.items():
        np.testing.assert_array_equal(column[name], given)
    assert kept.images is not None
    first, second = kept.images[:2] / 255
    largest = max(
        np.sqrt(np.mean((first[i : i + 2, j : j + 2] - second[i : i + 2, j : j + 2]) ** 2))
        for i in range(0, 8, 2)
        for j in range(0, 8, 2)
    )
    np.testing.assert_allclose(column["tiled-l2"][:2], [largest, largest], rtol=1e-12)
    assert np.isnan(column["tiled-l2"][4:]).all()  # the prompt's other image is not there yet
    # λ = 4, 1e-3, 0, -1, -8 with a noise of 1e-2 and sigma 0.5, so that the tangent threshold is -2
    first_point = {name: column[f"{name}@t1"][0] for name in OF_SPECTRA}
    assert first_point == pytest.approx(
        {
            "positive-count": 1,
            "tangent-count": 4,
            "largest-sum": -4.999,
            "largest": 4,
            "smallest": -8,
            "trace": -4.999,
            "cubed-trace": 512 + 1 - 64 - 1e-9,
            "spectral-gap": 4,  # |λ| = 8, 4, 1, 1e-3, 0
        },
        rel=1e-15,
    )
    done = ~np.isnan(values).any(-1)
    np.testing.assert_allclose(column["trace@t1"][done], values[done].sum(-1), rtol=1e-12)
    for name in OF_SPECTRA:
        for t in (981, 1):
            np.testing.assert_array_equal(np.isnan(column[f"{name}@t{t}"]), ~done)


def test_ritz_values_of_a_space_that_closed_early(kept: Kept):
    kept.eigenvalues[0, :, 1:] = np.nan  # one Ritz value: the multiplicity of its eigenvalue is not known
    plan = replace(PLAN, method="lanczos")
    found = compute_scores(plan, kept, choose(["largest-sum", "largest", "smallest", "trace"]))
    assert [one.name for one in found.detectors][3:] == ["largest-sum@t1", "largest@t1", "smallest@t1"]
    np.testing.assert_array_equal(found.values[0, 3:], [np.nan, 4, 4])


def test_counts_without_a_measured_noise_are_not_done(kept: Kept):
    kept.noise[0] = np.nan
    found = compute_scores(PLAN, _with_counts(kept), choose(["positive-count", "tangent-count"]))
    np.testing.assert_array_equal(found.values[0, 2:], [np.nan, 4])


def test_counts_of_an_operator_take_the_place_of_a_spectrum(kept: Kept):
    one = np.arange(12.0).reshape(6, 2)
    one[3, 0] = np.nan
    two = np.stack([one - 1, one + 1], -1)
    counts = {"estimate": one, "interval": two, "tangent_estimate": 3 * one, "tangent_interval": 3 * two}
    plan = replace(PLAN, method="none", count_budget=4, num_steps=5)
    assert plan.estimates_counts
    found = compute_scores(plan, kept._replace(counts=counts), registered())
    names = [one.name for one in found.detectors if one.timestep is not None]
    assert names == [f"{name}@t{t}" for t in (981, 1) for name in ("positive-count", "tangent-count")]
    np.testing.assert_array_equal(
        found.values[:, -4:], np.stack([one[:, 0], 3 * one[:, 0], one[:, 1], 3 * one[:, 1]], 1)
    )
    assert list(found.intervals) == names
    np.testing.assert_array_equal(found.intervals["tangent-count@t1"], 3 * two[:, 1])
    assert np.isnan(found.intervals["positive-count@t981"][3]).all()
