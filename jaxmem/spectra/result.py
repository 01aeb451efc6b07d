"""The one result type of every spectral method."""

from typing import Any, NamedTuple

import numpy as np

from jaxmem.extras import require_package
from jaxmem.krylov import Status
from jaxmem.spectra.methods import Method


class Spectrum(NamedTuple):
    """Eigenvalues of an operator with what is needed to trust them.

    Of one operator: plain numbers and NumPy arrays of k values. Of a batch: NumPy arrays with the points as leading
    axis in every field up to ``noise``; `point` takes one out. Eigenvalues are descending (by real part, then imaginary
    part, where complex). In a batch a Krylov method that stopped early fills the missing eigenvalues with NaN.
    Of a multiple eigenvalue one Krylov space holds one copy: the eigenvalues of `Lanczos` and `Arnoldi` are not the
    whole list, also where the status is INVARIANT (the space closed). `Extreme` looks for the other copies.

    For the symmetric part a residual bounds the distance to an eigenvalue of the operator as computed; that a score's
    own coefficients are rounded, a relative 1e-7 in float32, comes on top. For A itself it is a backward error: θ is an
    eigenvalue of a matrix that close to A, and how far from one of A itself depends on how far A is from normal (see
    ``asymmetry``).
    """

    eigenvalues: np.ndarray  #: real of the symmetric part (``method.symmetric``), complex of A itself
    residuals: np.ndarray  #: per eigenvalue, ‖A y - θ y‖ for its unit Ritz vector, at least ``noise`` (see below)
    vectors: np.ndarray | None  #: unit eigenvectors or Ritz vectors as rows, in the order of ``eigenvalues``
    num_products: Any  #: int: applications of A or Aᵀ to one vector, those of the measurements included
    status: Any  #: a `Status`; of a batch an array of their numbers
    asymmetry: Any  #: float: ‖A - Aᵀ‖ / ‖A‖, Frobenius; by one random probe for Krylov methods
    noise: Any  #: float: how far rounding can have moved an eigenvalue, measured (see `rounding_noise`)
    dtype: Any  #: data type of the products
    method: Method  #: the method that was asked for
    seed: np.ndarray | None  #: key data of the start vector; None for dense methods and for a given start

    def point(self, index: int) -> "Spectrum":
        """The spectrum of one point of a batch, without the NaN of a Krylov space that closed early.

        Raises:
            ValueError: if this is the spectrum of one operator.
        """
        if np.ndim(self.num_products) == 0:
            raise ValueError("spectrum: expected that of a batch, got that of one operator, which has no points")
        there = ~np.isnan(self.eigenvalues[index])
        return self._replace(
            eigenvalues=self.eigenvalues[index][there],
            residuals=self.residuals[index][there],
            num_products=int(self.num_products[index]),
            status=Status(int(self.status[index])),
            asymmetry=float(self.asymmetry[index]),
            noise=float(self.noise[index]),
        )

    def converged(self, rtol: float = 1e-4) -> np.ndarray:
        """Mask of the eigenvalues whose residual is at most ``rtol`` times the largest absolute eigenvalue."""
        return self.residuals <= rtol * np.nanmax(np.abs(self.eigenvalues), axis=-1, keepdims=True)

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with a row for each eigenvalue, and the columns below; NaN ones are left out.

        ``point`` (of a batch), ``rank`` (1 is the largest), ``eigenvalue``, ``residual``, ``converged``.

        Raises:
            MissingExtra: pandas is not installed.
        """
        require_package("pandas", "Spectrum.to_dataframe")
        import pandas

        *point, rank = np.indices(self.eigenvalues.shape)
        columns: dict[str, Any] = {"point": point[0]} if point else {}
        columns |= {"rank": rank + 1, "eigenvalue": self.eigenvalues, "residual": self.residuals}
        columns["converged"] = self.converged()
        there = ~np.isnan(self.eigenvalues)
        return pandas.DataFrame({name: values[there] for name, values in columns.items()})

    def to_xarray(self) -> Any:
        """An xarray Dataset with everything but the seed: the dimensions ``point`` (of a batch), ``rank``, ``entry``.

        Variables are ``converged`` and the fields of this class, ``vectors`` where there are some; `method` and `dtype`
        are attributes. ``rank`` counts from 1, the largest.

        Raises:
            MissingExtra: xarray is not installed.
        """
        require_package("xarray", "Spectrum.to_xarray")
        import xarray

        point = ("point",) * (self.eigenvalues.ndim - 1)
        rank = (*point, "rank")
        variables: dict[str, Any] = {
            "eigenvalues": (rank, self.eigenvalues, {"units": "1/x²"}),
            "residuals": (rank, self.residuals, {"units": "1/x²"}),
            "converged": (rank, self.converged()),
        }
        if self.vectors is not None:
            variables["vectors"] = ((*rank, "entry"), self.vectors)
        for name in ("num_products", "status", "asymmetry", "noise"):
            variables[name] = (point, np.asarray(getattr(self, name)))
        attributes = {"method": str(self.method), "dtype": np.dtype(self.dtype).name}
        return xarray.Dataset(variables, {"rank": np.arange(self.eigenvalues.shape[-1]) + 1}, attributes)


def rounding_noise(product_noise: Any, num_vectors: int, norm: Any, orthogonality_loss: Any = 0.0) -> Any:
    """Bound on the error of eigenvalues from the rounding of products: ``sqrt(m) eta + omega ‖A‖``.

    ``eta`` is the measured error of one product with a unit vector, so m products have an error matrix of Frobenius
    norm at most ``sqrt(m) eta``, which by Weyl's inequality bounds the shift of every eigenvalue; ``omega`` is the
    measured loss of orthogonality of the basis, or the backward error of the dense solver, relative to ‖A‖.

    It is about the linear map that was applied. What rounding did to its coefficients when the score was linearised is
    not in it, and can be larger by orders where the score itself cancels large numbers (an empirical score at a small
    timestep, where a softmax decides between training points): compare with a linearisation in float64 there.
    """
    return np.sqrt(num_vectors) * product_noise + orthogonality_loss * norm


def order_descending(eigenvalues: np.ndarray) -> np.ndarray:
    """Indices that sort by descending real part, then by descending imaginary part."""
    return np.lexsort((-eigenvalues.imag, -eigenvalues.real))
