"""Spectra of operators: dense and Krylov, one point or many, their ends, their density, and counts of eigenvalues."""

from jaxmem.spectra.batch import batch_spectra
from jaxmem.spectra.counting import Count, count_positive
from jaxmem.spectra.dense import DenseCost, dense_cost
from jaxmem.spectra.density import Density, spectral_density
from jaxmem.spectra.diagonals import Diagonal, diagonal
from jaxmem.spectra.estimate import Estimate
from jaxmem.spectra.methods import Arnoldi, Dense, Extreme, Lanczos
from jaxmem.spectra.one_operator import spectrum
from jaxmem.spectra.result import Spectrum, Status
from jaxmem.spectra.singular import SingularValues, singular_values
from jaxmem.spectra.traces import Trace, trace

__all__ = [
    "Arnoldi",
    "Count",
    "Dense",
    "DenseCost",
    "Density",
    "Diagonal",
    "Estimate",
    "Extreme",
    "Lanczos",
    "SingularValues",
    "Spectrum",
    "Status",
    "Trace",
    "batch_spectra",
    "count_positive",
    "dense_cost",
    "diagonal",
    "singular_values",
    "spectral_density",
    "spectrum",
    "trace",
]
