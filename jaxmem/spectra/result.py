"""The one result type of every spectral method."""

from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from jaxmem.extras import require_package
from jaxmem.krylov import Status

Method = Literal["eigh", "eig", "lanczos", "arnoldi"]
LARGEST_DENSE = 4096  #: dimensions up to which a matrix is held in memory, three times over


class Spectrum(NamedTuple):
    """Eigenvalues of an operator with what is needed to trust them; arrays are NumPy's.

    For a batch every array has the points as leading axis. Eigenvalues are descending (by real part, then imaginary
    part, where complex). Krylov methods that stopped early fill the missing eigenvalues with NaN.
    Of a multiple eigenvalue one Krylov space holds one copy: the eigenvalues of ``lanczos`` and ``arnoldi`` are not the
    whole list, also where the status is INVARIANT (the space closed). `extreme_pairs` looks for the other copies.

    For ``eigh`` and ``lanczos`` a residual bounds the distance to an eigenvalue of the symmetric part of the operator
    as computed; that a score's own coefficients are rounded, a relative 1e-7 in float32, comes on top. For ``eig`` and
    ``arnoldi`` it is a backward error: θ is an eigenvalue of a matrix that close to A, and how far from one of A
    itself depends on how far A is from normal (see ``asymmetry``).
    """

    eigenvalues: np.ndarray  #: real for ``eigh`` and ``lanczos`` (symmetric part), complex for ``eig`` and ``arnoldi``
    residuals: np.ndarray  #: per eigenvalue, ‖A y - θ y‖ for its unit Ritz vector, at least ``noise`` (see below)
    vectors: np.ndarray | None  #: unit eigenvectors or Ritz vectors as rows, in the order of ``eigenvalues``
    num_products: np.ndarray  #: applications of A or Aᵀ to one vector, those of the measurements included
    status: np.ndarray  #: a `Status` per point
    asymmetry: np.ndarray  #: ‖A - Aᵀ‖ / ‖A‖, Frobenius; by one random probe for Krylov methods
    noise: np.ndarray  #: how far rounding can have moved an eigenvalue, measured (see `rounding_noise`)
    dtype: Any  #: of the products
    method: Method
    seed: np.ndarray | None  #: key data of the start vector; None for dense methods and for a given start

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


def check_method(method: str, size: int, num_steps: int | None, max_dense: int = LARGEST_DENSE) -> None:
    """Refuse empty operators, unknown methods, impossible step numbers, and dense problems too large to hold."""
    if method not in get_args(Method):
        raise ValueError(f"method: expected one of {get_args(Method)}, got {method!r}")
    if size < 1:
        raise ValueError(f"operator: expected at least one dimension, got {size}")
    if method in ("eigh", "eig"):
        if num_steps is not None:
            raise ValueError(f"num_steps: expected None for the dense method {method!r}, got {num_steps}")
        if size > max_dense:
            raise ValueError(
                f"method {method!r} holds a dense {size} × {size} matrix; it is meant for sizes up to {max_dense}."
                f" Use dense_spectrum, which keeps its columns in a file, method='lanczos' or 'arnoldi' with num_steps,"
                f" or count_positive with a budget"
            )
    elif num_steps is None or not 1 <= num_steps <= size:
        raise ValueError(f"num_steps: expected 1 to {size} (the operator's size) for {method!r}, got {num_steps}")


def order_descending(eigenvalues: np.ndarray) -> np.ndarray:
    """Indices that sort by descending real part, then by descending imaginary part."""
    return np.lexsort((-eigenvalues.imag, -eigenvalues.real))


__all__ = ["Method", "Spectrum", "Status", "check_method", "order_descending", "rounding_noise"]
