"""What the figures of `jaxmem.plot` show is read back from their axes; results as tables."""

import subprocess
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import command_environment
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.image import imread

import jaxmem
from jaxmem import plot
from jaxmem.extras import MissingExtra
from jaxmem.function_operators import MatrixOperator
from jaxmem.report.style import GENERAL, MEMORIZED
from jaxmem.spectra import Count, Density

VALUES = np.array([3.0, 0.5, -1.0, -20.0, -25.0, -25.0, -30.0, -41.0])
OPERATOR = MatrixOperator(jnp.asarray(np.diag(VALUES) + np.diag(np.full(7, 0.1), 1), jnp.float32))
DENSE = dict(method=jaxmem.Dense())
DENSE_COMPLEX = dict(method=jaxmem.Dense(symmetric=False))
LANCZOS = dict(method=jaxmem.Lanczos(4), key=jax.random.key(0))
ARNOLDI = dict(method=jaxmem.Arnoldi(4), key=jax.random.key(0))


def found(options=DENSE):
    return jaxmem.spectrum(OPERATOR, **options)


def extreme():
    return jaxmem.spectrum(OPERATOR, jaxmem.Extreme(4, "both", max_products=200), key=jax.random.key(0))


def batch(options=DENSE):
    """Three points; of the second the last eigenvalues are missing."""
    one = found(options)
    eigenvalues = np.stack([one.eigenvalues, one.eigenvalues - 1, one.eigenvalues - 4])
    eigenvalues[1, -2:] = np.nan
    residuals, noise = np.stack([one.residuals] * 3), np.array([0.1, 0.3, 0.2])
    fields = {name: np.stack([getattr(one, name)] * 3) for name in ("num_products", "status", "asymmetry")}
    return one._replace(eigenvalues=eigenvalues, residuals=residuals, noise=noise, **fields)


@pytest.fixture(autouse=True)
def _close():
    yield
    pyplot.close("all")


def names(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def band(ax):
    """Lower and upper end of the only rectangle, which is that of rounding."""
    (patch,) = ax.patches
    return patch.get_y(), patch.get_y() + patch.get_height()


def levels(ax):
    return sorted(line.get_ydata()[0] for line in ax.lines if len(set(line.get_ydata())) == 1)


def is_a_picture(ax, path):
    ax.figure.savefig(path, dpi=100)
    pixels = imread(path)[..., :3]
    return pixels.shape[:2] == (360, 560) and pixels.std() > 0.05


def test_a_dense_spectrum_is_a_line_of_its_eigenvalues(tmp_path):
    result = found()
    ax = plot.spectrum(result, sigma=0.2)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), result.eigenvalues)
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), np.arange(1, 9))
    np.testing.assert_allclose(band(ax), (-result.noise, result.noise))
    np.testing.assert_allclose(levels(ax), [-25.0, -12.5, 0.0])
    assert ax.get_xlabel() == "rank of the eigenvalue, from the largest"
    assert ax.get_ylabel() == "eigenvalue ($1/x^2$)"
    assert names(ax) == [
        f"rounding, ±{result.noise:.1g}",
        r"$-1/(2\sigma_t^2)$: free to move above",
        r"$-1/\sigma_t^2$: lower bound",
    ]
    assert is_a_picture(ax, tmp_path / "dense.png")


@pytest.mark.parametrize("make", [lambda: found(LANCZOS), extreme], ids=["lanczos", "extreme"])
def test_ritz_values_have_their_residuals_as_bars(make, tmp_path):
    result = make()
    ax = plot.spectrum(result, label="Ritz")
    (container,) = ax.containers
    points, _, (bars,) = container.lines
    np.testing.assert_array_equal(points.get_ydata(), result.eigenvalues)
    assert points.get_linestyle() == "None"
    ends = np.array(bars.get_segments())[:, :, 1]
    np.testing.assert_allclose(ends[:, 0], result.eigenvalues - result.residuals)
    np.testing.assert_allclose(ends[:, 1], result.eigenvalues + result.residuals)
    assert ax.get_xlabel() == "rank of the Ritz value, from the largest"
    assert "Ritz" in names(ax)
    assert is_a_picture(ax, tmp_path / "ritz.png")


@pytest.mark.parametrize("options", [DENSE_COMPLEX, ARNOLDI], ids=["eig", "arnoldi"])
def test_complex_eigenvalues_show_their_real_part(options):
    result = found(options)
    ax = plot.spectrum(result)
    assert ax.get_ylabel() == "real part of the eigenvalue ($1/x^2$)"
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), result.eigenvalues.real)


@pytest.mark.parametrize("options", [DENSE, LANCZOS], ids=["eigh", "lanczos"])
def test_a_batch_is_one_faint_line_per_point_and_their_mean(options, tmp_path):
    result = batch(options)
    ax = plot.spectrum(result, label="general")
    *singles, mean, _ = ax.lines  # the last is the zero line
    assert len(singles) == 3
    for line, values in zip(singles, result.eigenvalues, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), values)
        assert line.get_alpha() < 0.5
    np.testing.assert_allclose(mean.get_ydata(), np.nanmean(result.eigenvalues, 0))
    np.testing.assert_allclose(band(ax), (-0.3, 0.3))  # the largest of the batch
    assert names(ax)[0] == "general: mean of 3 points"
    assert is_a_picture(ax, tmp_path / "batch.png")


def test_a_rank_that_no_point_has_is_a_gap():
    result = batch()
    result.eigenvalues[:, -1] = np.nan
    mean = plot.spectrum(result).lines[3].get_ydata()
    np.testing.assert_array_equal(np.isnan(mean), np.arange(8) == 7)


def test_two_spectra_share_axes_and_one_set_of_reference_lines():
    _, ax = pyplot.subplots()
    ax.set_ylabel("mine")
    assert plot.spectrum(found(), ax, label="a", sigma=0.2) is ax
    plot.spectrum(found(), ax, label="b", color=MEMORIZED, sigma=0.2)
    assert ax.get_ylabel() == "mine"
    assert len(names(ax)) == len(set(names(ax))) == 5
    curves = [line for line in ax.lines if len(line.get_ydata()) == 8]
    assert [line.get_color() for line in curves] == [GENERAL, MEMORIZED]
    assert len(pyplot.get_fignums()) == 1


def test_the_logarithmic_axis_is_linear_around_zero():
    ax = plot.spectrum(found(), log=True)
    assert ax.get_yscale() == "symlog"
    assert ax.yaxis.get_transform().linthresh == pytest.approx(41 / 10_000, rel=1e-2)
    coarse = found()._replace(noise=np.array(0.5))
    assert plot.spectrum(coarse, log=True).yaxis.get_transform().linthresh == 0.5
    nothing = found()._replace(eigenvalues=np.zeros(8), noise=np.array(0.0))
    assert plot.spectrum(nothing, log=True).get_yscale() == "symlog"


def count(lower, estimate, low, high):
    return Count(lower, estimate, (low, high), 0.0, 10, lower, None)


def test_counts_have_their_intervals_as_bars(tmp_path):
    ax = plot.count_against_t([1, 281, 981], [count(2, 2.0, 2, 2), count(5, 8.0, 6, 13), count(9, 30.0, 20, 41)])
    points, _, (bars,) = ax.containers[0].lines
    np.testing.assert_array_equal(points.get_xydata(), [[1, 2], [281, 8], [981, 30]])
    ends = np.array(bars.get_segments())[:, :, 1]
    np.testing.assert_allclose(ends, [[2, 2], [6, 13], [20, 41]])
    np.testing.assert_array_equal(ax.lines[-1].get_ydata(), [2, 5, 9])
    assert sorted(names(ax)) == ["certified lower bound", "estimate, 95 % interval"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("timestep t", "number of positive eigenvalues")
    assert is_a_picture(ax, tmp_path / "counts.png")


def test_exact_counts_have_no_bound_of_their_own():
    ax = plot.count_against_t([1, 281], [count(2, 2.0, 2, 2), count(5, 5.0, 5, 5)])
    assert names(ax) == ["estimate, 95 % interval"]


def test_numbers_of_many_points_are_a_mean_and_a_range():
    numbers = np.array([[1, 4, np.nan, 8], [3, 2, np.nan, np.nan]])
    ax = plot.count_against_t(np.array([0, 10, 20, 30]), numbers, label="nines", marker="s")
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), [[0, 2], [10, 3], [30, 8]])
    corners = ax.collections[0].get_paths()[0].vertices
    for t, low, high in ((0, 1, 3), (10, 2, 4), (30, 8, 8)):
        at = corners[corners[:, 0] == t, 1]
        assert (at.min(), at.max()) == (low, high)
    assert names(ax) == ["nines: mean, range"]
    one = plot.count_against_t([0, 10], [3, 4])
    np.testing.assert_array_equal(one.lines[0].get_xydata(), [[0, 3], [10, 4]])
    assert one.get_legend() is None


DENSITY = Density(
    levels=np.array([-4.0, -3.0, -1.0, 0.0, 4.0]),
    cumulative=np.array([0.1, 0.5, 0.5, 0.9, 1.0]),
    width=np.array([0.02, 0.04, 0.0, 0.02, 0.0]),
    standard_error=np.array([0.1, 0.05, 0.05, 0.01, 0.0]),
    num_products=12,
)


def test_the_area_of_a_density_is_the_share_of_eigenvalues(tmp_path):
    ax = plot.density(DENSITY, bins=None, label="twelve")
    data = ax.patches[-1].get_data()
    np.testing.assert_allclose(data.values, [0.4, 0.0, 0.4, 0.025])
    np.testing.assert_array_equal(data.edges, DENSITY.levels)
    assert (ax.get_xlabel(), ax.get_ylabel()) == (r"eigenvalue $\lambda$ ($1/x^2$)", "density of eigenvalues ($x^2$)")
    assert names(ax) == ["twelve"]
    coarse = plot.density(DENSITY, bins=2).patches[-1].get_data()
    np.testing.assert_allclose(coarse.values, [0.8 / 4, 0.1 / 4])
    assert is_a_picture(ax, tmp_path / "density.png")


def test_the_cumulative_density_has_a_band_within_0_and_1():
    ax = plot.density(DENSITY, cumulative=True)
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), np.stack([DENSITY.levels, DENSITY.cumulative], 1))
    corners = ax.collections[0].get_paths()[0].vertices
    for level, low, high in ((-4, 0, 0.31), (-3, 0.38, 0.62), (-1, 0.4, 0.6), (0, 0.87, 0.93), (4, 1, 1)):
        at = corners[corners[:, 0] == level, 1]
        np.testing.assert_allclose((at.min(), at.max()), (low, high))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: plot.spectrum(found(), Figure()), "ax: expected matplotlib axes or None, got Figure"),
        (
            lambda: plot.count_against_t([0, 1], np.zeros((2, 3))),
            r"counts: expected one per timestep, shape \(2,\) or \(points, 2\), got shape \(2, 3\)",
        ),
        (lambda: plot.count_against_t([0, 1], [count(1, 1.0, 1, 1)]), r"counts: .* got shape \(1,\)"),
        (
            lambda: plot.density(DENSITY, bins=0),
            "bins: expected at least 1, or None .*, got 0",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_without_matplotlib_the_extra_is_named():
    program = "import sys; sys.modules['matplotlib'] = None; import jaxmem; jaxmem.plot"
    done = subprocess.run(
        [sys.executable, "-c", program], env=command_environment(), capture_output=True, text=True, check=False
    )
    last = done.stderr.splitlines()[-1]
    assert "MissingExtra: plots: expected the packages of jaxmem[audit]" in last
    assert "without matplotlib; install them: pip install 'jaxmem[audit]'" in last


def test_a_spectrum_is_a_table_with_a_row_per_eigenvalue():
    result = found()
    table = result.to_dataframe()
    assert list(table) == ["rank", "eigenvalue", "residual", "converged"]
    np.testing.assert_array_equal(table["rank"], np.arange(1, 9))
    np.testing.assert_array_equal(table["eigenvalue"], result.eigenvalues)
    np.testing.assert_array_equal(table["residual"], result.residuals)
    assert table["converged"].all()  # a dense solver's residuals are rounding


def test_the_table_of_a_batch_names_the_points_and_leaves_out_what_is_missing():
    result = batch()
    table = result.to_dataframe()
    assert list(table) == ["point", "rank", "eigenvalue", "residual", "converged"]
    assert table.groupby("point").size().tolist() == [8, 6, 8]
    for row in table.itertuples():
        assert row.eigenvalue == result.eigenvalues[row.point, row.rank - 1]
    assert not found(LANCZOS).to_dataframe()["converged"].all()  # four steps of eight


def test_a_density_is_a_table_with_a_row_per_level():
    table = DENSITY.to_dataframe()
    assert list(table) == ["level", "cumulative", "width", "standard_error"]
    np.testing.assert_array_equal(table.to_numpy(), np.stack(DENSITY[:4], 1))


def with_vectors():
    return jaxmem.spectrum(OPERATOR, vectors=True, **DENSE)


@pytest.mark.parametrize("make", [found, with_vectors, batch, extreme])
def test_the_variables_of_a_dataset_have_the_dimensions_they_name(make, monkeypatch):
    """With a stand-in that checks sizes as xarray does, for where xarray is not installed."""
    seen = {}

    def dataset(variables, coordinates, attributes):
        sizes = {name: len(values) for name, values in coordinates.items()}
        for dimensions, values, *_ in variables.values():
            assert len(dimensions) == np.ndim(values)
            for name, size in zip(dimensions, np.shape(values), strict=True):
                assert sizes.setdefault(name, size) == size
        seen.update(variables=variables, sizes=sizes, attributes=attributes)

    module = ModuleType("xarray")
    module.__spec__, module.Dataset = ModuleSpec("xarray", None), dataset
    monkeypatch.setitem(sys.modules, "xarray", module)
    result = make()
    result.to_xarray()
    expected = {"eigenvalues", "residuals", "converged", "num_products", "status", "asymmetry", "noise"}
    assert set(seen["variables"]) == expected | ({"vectors"} if result.vectors is not None else set())
    assert seen["sizes"]["rank"] == result.eigenvalues.shape[-1]
    assert seen["attributes"]["dtype"] == "float32"


def test_a_spectrum_is_a_dataset():
    pytest.importorskip("xarray")
    result = batch()
    table = result.to_xarray()
    assert table["eigenvalues"].dims == ("point", "rank")
    assert table["eigenvalues"].attrs["units"] == "1/x²"
    np.testing.assert_array_equal(table["eigenvalues"].sel(rank=2), result.eigenvalues[:, 1])
    np.testing.assert_array_equal(table["noise"], result.noise)
    one = with_vectors()
    np.testing.assert_array_equal(one.to_xarray()["vectors"].sel(rank=1), one.vectors[0])


@pytest.mark.parametrize(
    ("package", "convert", "name"),
    [
        ("pandas", lambda: found().to_dataframe(), "Spectrum.to_dataframe"),
        ("pandas", lambda: DENSITY.to_dataframe(), "Density.to_dataframe"),
        ("xarray", lambda: found().to_xarray(), "Spectrum.to_xarray"),
    ],
)
def test_a_missing_package_is_named(package, convert, name, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=f"^{name}: expected {package}, .* install it: pip install {package}$"):
        convert()


def test_modules_are_public_names():
    assert jaxmem.plot is plot
    assert jaxmem.oracles.gaussian
    assert {"plot", "oracles", "sample"} <= set(dir(jaxmem))
    with pytest.raises(AttributeError, match=r"has no attribute 'plots'; it has .*plot"):
        jaxmem.plots  # noqa: B018
