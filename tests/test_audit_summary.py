"""The end of an audit: thresholds on halves, and the paper's figures from any audit with categories."""

from dataclasses import replace

import numpy as np
import pytest
import synthetic_audit

from jaxmem.audit.summary import summary_metrics
from jaxmem.prompts import NO_PROMPT, Prompt, first_of_each
from jaxmem.report import paper


def test_a_threshold_is_fixed_on_half_of_the_prompts_and_judged_on_the_other():
    result = synthetic_audit.audit(per_category=40)  # 120 negatives, of which a half has 60
    metrics = summary_metrics(result)
    assert set(metrics["held_out"]) == set(metrics["detectors"])
    labels = np.array([prompt.label for prompt in result.prompts])
    for i, detector in enumerate(result.detectors):
        found = metrics["held_out"][detector.name]
        assert found["0.01"] is None  # one false alarm of 60 would be more than 1 %
        split = found["0.03"]
        scores = result.scores[..., i]
        strict = np.inf if split["threshold"] is None else split["threshold"]  # ties can leave nothing to accept
        sign = 1 if detector.memorized_is == "high" else -1
        accepted = sign * scores >= (strict if split["threshold"] is None else sign * strict)
        # Both halves together: the rates of the two weigh them by their sizes.
        for rate, flag, number in (("fpr", False, "num_negative"), ("tpr", True, "num_positive")):
            sizes = split[number]
            both = (sizes[0] * split[f"fitted_{rate}"] + sizes[1] * split[rate]) / sum(sizes)
            np.testing.assert_allclose(both, accepted[labels == flag].mean(), atol=1e-12)


def test_eigenvalues_that_no_density_has_are_counted():
    """Two of 48 below -1/sigma² at the last timestep, one of them by less than rounding."""
    result = synthetic_audit.audit()
    values = result.eigenvalues.copy()
    bound = -1 / result.sigma[list(result.timesteps).index(41)] ** 2
    values[:, :, 3, -1], values[:, :, 3, -2] = 1.5 * bound, bound - 5e-5  # the noise is 1e-4
    shares = summary_metrics(replace(result, eigenvalues=values))["share_below_bound"]
    assert shares == pytest.approx({"981": 0, "481": 0, "281": 0, "41": 1 / 48})
    ritz = synthetic_audit.audit(method="lanczos")
    assert summary_metrics(ritz)["share_below_bound"] == {}


def test_without_both_labels_there_is_no_threshold():
    result = synthetic_audit.audit(labels=False)
    assert summary_metrics(result)["held_out"] == {}


@pytest.mark.parametrize("method", ["eigh", "lanczos"])
@pytest.mark.parametrize("images", [True, False])
def test_the_papers_figures_are_drawn_from_an_audit(tmp_path, method, images):
    result = synthetic_audit.audit(method=method, images=images)
    hostile = Prompt(r"costs $\frac{5 and $6_^", True, r"$\x$ $")  # no formula, whatever stands between dollars
    result = replace(result, prompts=[hostile, *result.prompts[1:-1], NO_PROMPT])
    made = paper.draw(result, tmp_path)
    assert [path.name for path in made] == [f"figure{i}.png" for i in range(6, 12)]  # one category more
    assert all(path.stat().st_size > 10_000 for path in made)
    assert list(paper.categories(result))[-1] == "no prompt"


def test_without_categories_or_spectra_there_is_no_figure(tmp_path):
    for result in (synthetic_audit.audit(labels=False), synthetic_audit.audit(method="none")):
        with pytest.raises(ValueError, match=r"audit: expected prompts with categories and spectra"):
            paper.draw(result, tmp_path)


def test_the_first_prompts_of_each_category():
    prompts = [Prompt(f"{kind} {i}", None, kind) for i in range(3) for kind in ("b", "a")]
    assert [p.text for p in first_of_each(prompts, 2)] == ["b 0", "b 1", "a 0", "a 1"]
    # The lists that are public give memorized prompts a type, and the others none.
    found = first_of_each([*prompts, Prompt("alone", False), Prompt("x", None, "none")], 2)
    assert found[4:] == [Prompt("alone", False, "none"), Prompt("x", None, "none")]
    with pytest.raises(ValueError, match=r"expected a category of each, such as"):
        first_of_each([Prompt("alone")], 2)
    with pytest.raises(ValueError, match=r"expected a category of each memorized prompt, got none of 'copied'"):
        first_of_each([*prompts, Prompt("copied", True)], 2)
    with pytest.raises(ValueError, match=r"per_category: expected at least 1 prompt of each, got 0"):
        first_of_each(prompts, 0)
