"""The methods that `jaxmem.spectrum` and `jaxmem.batch_spectra` take: what is asked for, and how much effort it gets.

Each is checked when it is made, and against the operator's size before any product.
"""

from dataclasses import dataclass, field
from operator import index
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

LARGEST_DENSE = 4096  #: dimensions up to which a matrix is held in memory, three times over
Which = Literal["largest", "smallest", "both"]


@dataclass(frozen=True)
class Dense:
    """All d eigenvalues, through the matrix: d products and one to measure rounding.

    Without a folder the matrix is in memory, three times over in float64, and d is at most 4,096. With one, its columns
    are kept in a file as they come, at any size (`jaxmem.spectra.dense.dense_from_file`).

    Args:
        symmetric: of the symmetric part ½(A + Aᵀ), or else of A itself, which are complex.
        folder: the folder of the columns; the same as the argument ``folder`` of `jaxmem.spectrum`.

    Raises:
        ValueError: on a folder for the eigenvalues of A itself.
    """

    symmetric: bool = field(default=True, kw_only=True)
    folder: str | Path | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self.check_folder(self.folder)

    def check_folder(self, folder: Any) -> None:
        """Refuse a folder that has no use."""
        if folder is not None and not self.symmetric:
            raise ValueError(
                "folder: expected none for the eigenvalues of A itself (`symmetric` is False), got one; take those of"
                " the symmetric part, or Arnoldi"
            )

    def check_size(self, size: int) -> None:
        """Refuse a matrix that is too large for the memory."""
        if size > LARGEST_DENSE:
            raise ValueError(
                f"method: Dense() holds a matrix of {size} × {size}; in memory it is meant for sizes up to"
                f" {LARGEST_DENSE}. Give a `folder`, which keeps its columns in a file, take Lanczos, Arnoldi or"
                f" Extreme, or count_positive with `max_products`"
            )


@dataclass(frozen=True)
class Lanczos:
    """Ritz values of the symmetric part ½(A + Aᵀ) after Lanczos steps from one vector, with full reorthogonalisation.

    A step costs one product where A is symmetric by declaration, else two.

    Args:
        num_steps: steps, 1 to d.
        tolerance: when a Krylov space counts as closed, relative to the largest ‖A q‖ (see `jaxmem.krylov.extend`); 0
            goes on to ``num_steps``. The default, None, is 20 eps of the products' precision.

    Raises:
        ValueError: if a number is out of range.
    """

    num_steps: int
    tolerance: float | None = None
    symmetric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_krylov(self)

    def check_size(self, size: int) -> None:
        """Refuse more steps than dimensions."""
        _within("num_steps", self.num_steps, size)


@dataclass(frozen=True)
class Arnoldi:
    """Ritz values of A itself, complex, after Arnoldi steps from one vector (the paper's Algorithm 1).

    A step costs one product.

    Args:
        num_steps: steps, 1 to d.
        tolerance: as of `Lanczos`.

    Raises:
        ValueError: if a number is out of range.
    """

    num_steps: int
    tolerance: float | None = None
    symmetric: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_krylov(self)

    def check_size(self, size: int) -> None:
        """Refuse more steps than dimensions."""
        _within("num_steps", self.num_steps, size)


@dataclass(frozen=True)
class Extreme:
    """The k eigenvalues at the ends of the spectrum to ``‖A y - θ y‖ ≤ rtol ‖A‖``, with all copies of multiple ones.

    How, and what each status promises, is told by `jaxmem.spectra.extreme.extreme_pairs`.

    Args:
        k: eigenvalues, 1 to d.
        which: ``"largest"``, ``"smallest"`` (algebraically; by real part for A itself) or ``"both"``: half from each
            end, an odd one from the top, as ARPACK's ``BE``.
        max_products: most products with A or Aᵀ, those of the measurements included.
        rtol: of the largest |θ| seen, which stands for ‖A‖. The default is that of `Spectrum.converged`.
        block: start vectors, and products taken together by one `jax.vmap` of the operator; counted as that many. More
            products in all, fewer batches. One vector sees one copy of a multiple eigenvalue, and each check brings one
            more; a block sees up to ``block`` copies at once.
        subspace: rows of the basis before a restart; the larger, the fewer products. Default 512, or 4 k where that is
            more: up to there no Krylov method from the same vector needs fewer products. All d, without a restart,
            where less than a block would be missing. The look for copies needs room, too: where it learns nothing
            between restarts, the basis grows, to twice this at most. A small one takes many more products.
        symmetric: of the symmetric part ½(A + Aᵀ), by thick-restart Lanczos (Wu and Simon 2000); or else of A itself,
            by Krylov-Schur (Stewart 2001).

    Raises:
        ValueError: if a number or a choice is out of range.
    """

    k: int
    which: Which = "largest"
    max_products: int = field(kw_only=True)
    rtol: float = field(default=1e-4, kw_only=True)
    block: int = field(default=1, kw_only=True)
    subspace: int | None = field(default=None, kw_only=True)
    symmetric: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        _make_whole(self, "k", "max_products", "block", "subspace")
        if self.which not in get_args(Which):
            raise ValueError(f"which: expected one of {get_args(Which)}, got {self.which!r}")
        for name in ("k", "max_products", "block"):
            _at_least_one(name, getattr(self, name))
        if not self.rtol > 0:
            raise ValueError(
                f"rtol: expected a positive number, got {self.rtol}; what rounding forbids is said in the result"
            )

    def check_size(self, size: int) -> None:
        """Refuse more than there are, and a basis that is too small."""
        _within("k", self.k, size)
        _within("block", self.block, size)
        least = least_subspace(self, size)
        if self.subspace is not None and self.subspace < min(least, size):
            raise ValueError(
                f"subspace: expected at least {least} for {self.k} pairs and blocks of {self.block}, got"
                f" {self.subspace}"
            )


def least_subspace(method: Extreme, size: int) -> int:
    """The smallest basis: a restart keeps half of what is not wanted, and must leave room for a block."""
    return min(-(-size // method.block) * method.block, method.k + 2 * method.block + 2)


def basis_rows(method: Extreme, size: int) -> int:
    """Rows of the basis before a restart."""
    subspace = method.subspace
    if subspace is None:
        subspace = max(least_subspace(method, size), 512, 4 * method.k)
    # A block past d would bring rows of zeros into a restart; nearly all of the space is the same as all of it.
    return -(-size // method.block) * method.block if subspace + method.block > size else subspace


Krylov = Lanczos | Arnoldi
Method = Dense | Lanczos | Arnoldi | Extreme


def check_method(method: Any, size: int) -> None:
    """Refuse what is no method, and empty operators."""
    if not isinstance(method, Method):
        raise ValueError(
            f"method: expected Dense(), Lanczos(num_steps), Arnoldi(num_steps) or Extreme(k, max_products=...), got"
            f" {method!r}"
        )
    if size < 1:
        raise ValueError(f"operator: expected at least one dimension, got {size}")


def _make_whole(method: Any, *names: str) -> None:
    """Plain integers of whatever stands for one, such as NumPy's: they become options in files."""
    for name in names:
        value = getattr(method, name)
        object.__setattr__(method, name, None if value is None else index(value))


def _check_krylov(method: Krylov) -> None:
    _make_whole(method, "num_steps")
    _at_least_one("num_steps", method.num_steps)
    if method.tolerance is not None and not method.tolerance >= 0:
        raise ValueError(f"tolerance: expected 0 or a positive number, got {method.tolerance}")
    if method.tolerance is not None:  # hashed by jit, written out in files
        object.__setattr__(method, "tolerance", float(method.tolerance))


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def _within(name: str, value: int, size: int) -> None:
    if not 1 <= value <= size:
        raise ValueError(f"{name}: expected 1 to {size} (the operator's size), got {value}")
