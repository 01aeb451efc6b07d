"""The list of detectors, and the table of their scores against formulas on small arrays."""

from dataclasses import asdict

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem import count_positive
from jaxmem.memorization.registry import FAMILIES, Detector, detectors
from jaxmem.memorization.table import score_table
from jaxmem.operators import MatrixOperator
from jaxmem.runs.durable import as_json

OF_SCORES = ["wen-1", "wen-5", "wen-all", "jeon", "score-evolution", "anisotropy", "tiled-l2"]
OF_SPECTRA = ["positive-count", "tangent-count", "largest-sum", "largest", "smallest", "trace", "cubed-trace"]


def names(found: tuple[Detector, ...]) -> list[str]:
    return [one.name for one in found]


def test_what_each_kind_of_audit_can_run():
    whole = detectors(50, spectral_timesteps=(981, 281), method="eigh", num_noises=4)
    assert names(whole) == OF_SCORES + [f"{name}@t{t}" for t in (981, 281) for name in OF_SPECTRA]
    assert names(detectors(1)) == ["wen-1", "jeon", "anisotropy"]
    assert names(detectors(4, num_noises=2)) == [
        "wen-1",
        "wen-all",
        "jeon",
        "score-evolution",
        "anisotropy",
        "tiled-l2",
    ]
    assert names(detectors(5, families=["wen"])) == ["wen-1", "wen-5"]  # all are five
    # Ritz values of some steps tell the ends of the spectrum; counts come only with `count_positive`
    few = dict(families=["spectrum"], spectral_timesteps=(981,), method="lanczos")
    ends = ["largest-sum@t981", "largest@t981", "smallest@t981"]
    assert names(detectors(1, **few)) == ends
    assert names(detectors(1, counted=True, **few)) == ["positive-count@t981", "tangent-count@t981", *ends]
    assert names(detectors(1, counted=True, families=["spectrum"], spectral_timesteps=(1,))) == [
        "positive-count@t1",
        "tangent-count@t1",
    ]


def test_every_detector_says_what_it_is():
    found = detectors(50, spectral_timesteps=(981, 281), method="eigh", num_noises=4, k=7)
    assert len({one.name for one in found}) == len({one.title for one in found}) == len(found)
    for one in found:
        assert one.formula
        assert one.paper
        assert one.memorized_is in ("high", "low")
        assert "{k}" not in one.title + one.formula
        assert Detector(**as_json(asdict(one), "detector")) == one
    by_name = {one.name: one for one in found}
    assert [name for name, one in by_name.items() if not one.on_trajectory] == ["anisotropy"]
    assert [name for name, one in by_name.items() if one.is_count and one.timestep == 281] == [
        "positive-count@t281",
        "tangent-count@t281",
    ]
    assert by_name["largest-sum@t281"].formula == "λ₁ + … + λ_7"
    assert by_name["largest-sum@t281"].number == 7
    assert by_name["anisotropy"].formula.startswith("1 ‖ε_c - ε_u‖₂(x_T, t₀) + 2 mean cos")
    (weighted,) = detectors(1, families=["anisotropy"], anisotropy_weights=(1.0, 0.1))
    assert weighted.formula.startswith("1 ‖ε_c - ε_u‖₂(x_T, t₀) + 0.1 mean cos")
    assert [by_name[name].memorized_is for name in OF_SCORES] == ["high"] * 6 + ["low"]
    assert [by_name[f"{name}@t281"].memorized_is for name in OF_SPECTRA] == ["low"] * 6 + ["high"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_steps=0), "num_steps: expected at least 1, got 0"),
        (dict(num_steps=3, k=0), "k: expected at least 1, got 0"),
        (dict(num_steps=3, num_noises=0), "num_noises: expected at least 1, got 0"),
        (dict(num_steps=3, method="dense"), r"method: expected one of \('eigh', .*got 'dense'"),
        (dict(num_steps=3, families=["wen", "ren"]), r"families: expected some of \('wen', .*got 'ren'"),
        (dict(num_steps=2, families=["score-evolution"]), "'score-evolution' needs at least 3 steps, got 2"),
        (dict(num_steps=3, families=["tiled-l2"]), "'tiled-l2' needs at least two noises per prompt, got 1"),
        (dict(num_steps=3, families=FAMILIES, num_noises=2), "'spectrum' needs at least spectral_timesteps and a meth"),
        (
            dict(num_steps=3, families=["spectrum"], spectral_timesteps=(1,)),
            r"'spectrum' needs at least .*got \(1,\) and 'none'",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_impossible_lists_are_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        detectors(**arguments)


@pytest.fixture
def audit() -> dict:
    """Three prompts, two noises, six steps, two spectra of five eigenvalues; the last point is not done."""
    rng = np.random.default_rng(0)
    values = -np.sort(-rng.normal(size=(3, 2, 2, 5)))
    values[0, 0, 1] = [4.0, 1e-3, 0.0, -1.0, -8.0]
    noise = np.full((3, 2, 2), 1e-2)
    eps = rng.uniform(1, 2, (3, 2, 6))
    values[2, 1], noise[2, 1], eps[2, 1, 1:] = np.nan, np.nan, np.nan
    sampled = np.ones((3, 2), bool)
    sampled[2, 1] = False
    return dict(
        eps_difference=eps,
        timesteps=np.array([981, 801, 601, 401, 201, 1]),
        sigma=np.array([0.99, 0.9, 0.8, 0.7, 0.6, 0.5]),
        spectral_timesteps=np.array([981, 1]),
        eigenvalues=values,
        noise=noise,
        columns={name: rng.normal(size=(3, 2)) for name in ("jeon", "score-evolution", "anisotropy")},
        images=rng.integers(0, 256, (3, 2, 8, 8, 3), np.uint8),
        sampled=sampled,
    )


def test_the_table_follows_the_formulas(audit: dict):
    chosen = detectors(6, spectral_timesteps=(981, 1), method="eigh", num_noises=2, k=2)
    table = score_table(chosen, **audit)
    assert table.shape == (3, 2, len(chosen))
    column = {one.name: table[..., i] for i, one in enumerate(chosen)}
    eps, values = audit["eps_difference"], audit["eigenvalues"][:, :, 1]
    np.testing.assert_array_equal(column["wen-1"], eps[..., 0])
    np.testing.assert_allclose(column["wen-5"], eps[..., :5].sum(-1) / 5, rtol=1e-15)
    np.testing.assert_allclose(column["wen-all"], eps.sum(-1) / 6, rtol=1e-15)
    for name, given in audit["columns"].items():
        np.testing.assert_array_equal(column[name], given)
    first, second = audit["images"][0] / 255
    largest = max(
        np.sqrt(np.mean((first[i : i + 2, j : j + 2] - second[i : i + 2, j : j + 2]) ** 2))
        for i in range(0, 8, 2)
        for j in range(0, 8, 2)
    )
    np.testing.assert_allclose(column["tiled-l2"][0], [largest, largest], rtol=1e-12)
    assert np.isnan(column["tiled-l2"][2]).all()  # the prompt's other image is not there yet
    # λ = 4, 1e-3, 0, -1, -8 with a noise of 1e-2 and sigma 0.5, so that the tangent threshold is -2
    found = {name: column[f"{name}@t1"][0, 0] for name in OF_SPECTRA}
    assert found == pytest.approx(
        {
            "positive-count": 1,
            "tangent-count": 4,
            "largest-sum": 4.001,
            "largest": 4,
            "smallest": -8,
            "trace": -4.999,
            "cubed-trace": 512 + 1 - 64 - 1e-9,
        },
        rel=1e-15,
    )
    done = ~np.isnan(values).any(-1)
    np.testing.assert_allclose(column["trace@t1"][done], values[done].sum(-1), rtol=1e-12)
    for name in OF_SPECTRA:
        for t in (981, 1):
            np.testing.assert_array_equal(np.isnan(column[f"{name}@t{t}"]), ~done)


def test_ritz_values_of_a_space_that_closed_early(audit: dict):
    audit["eigenvalues"][0, 0, :, 1:] = np.nan  # one Ritz value: the multiplicity of its eigenvalue is not known
    chosen = detectors(6, families=["spectrum"], spectral_timesteps=(1,), method="lanczos", k=2)
    table = score_table(chosen, **audit)
    np.testing.assert_array_equal(table[0, 0], [np.nan, 4, 4])


def test_counts_without_a_measured_noise_are_not_done(audit: dict):
    audit["noise"][0, 0] = np.nan
    chosen = detectors(6, families=["spectrum"], spectral_timesteps=(1,), method="eigh")
    found = dict(zip(names(chosen), score_table(chosen, **audit)[0, 0], strict=True))
    assert np.isnan(found["positive-count@t1"])
    assert found["tangent-count@t1"] == 4


def test_counts_of_an_operator_take_the_place_of_a_spectrum(audit: dict):
    matrix = np.diag(np.concatenate([np.full(3, 2.0), np.full(4, -0.1), np.full(5, -9.0)]))
    operator = MatrixOperator(jnp.asarray(matrix, jnp.float32), symmetric=True)
    count = count_positive(operator, sigma=1.0)
    columns = {
        "positive-count@t1": np.array([[count.estimate, np.nan]] * 3),
        "tangent-count@t1": np.array([[count.tangent.estimate, np.nan]] * 3),
    }
    chosen = detectors(6, families=["spectrum"], spectral_timesteps=(1,), counted=True)
    table = score_table(chosen, eps_difference=audit["eps_difference"], columns=columns)
    np.testing.assert_array_equal(table[1], [[3, 7], [np.nan, np.nan]])
    # beside a spectrum they come first
    chosen = detectors(6, families=["spectrum"], spectral_timesteps=(1,), method="eigh")
    audit["columns"] |= columns
    np.testing.assert_array_equal(score_table(chosen, **audit)[1, 0, :2], [3, 7])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(eps_difference=np.zeros((3, 2))), r"eps_difference: expected shape \(N, M, S\), got \(3, 2\)"),
        (dict(columns={}), "score_table: the arrays of 'jeon' are missing"),
        (dict(columns={"jeon": np.zeros((2, 3))}), r"jeon: expected shape \(3, 2\), got \(2, 3\)"),
        (dict(images=None), "score_table: the arrays of 'tiled-l2' are missing"),
        (dict(sampled=np.ones((3, 1), bool)), r"sampled: expected shape \(3, 2\), got \(3, 1\)"),
        (dict(eigenvalues=None), "score_table: the arrays of 'positive-count@t981' are missing"),
        (dict(noise=np.zeros((3, 2))), r"noise: expected shape \(3, 2, 2\), got \(3, 2\)"),
        (dict(spectral_timesteps=np.array([801, 1])), r"'positive-count@t981': expected its timestep among .*801, 1"),
        (dict(eigenvalues=np.zeros((3, 2, 2, 1))), "k: expected 1 to 1 .*got 2"),
    ],
)
def test_missing_and_misshaped_arrays_are_refused(audit: dict, change: dict, message: str):
    chosen = detectors(6, spectral_timesteps=(981, 1), method="eigh", num_noises=2, k=2)
    with pytest.raises(ValueError, match=message):
        score_table(chosen, **(audit | change))
