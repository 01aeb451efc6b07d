"""Spectra of operators: dense and Krylov, one point or many, their ends, their density, and counts of eigenvalues."""

from jaxmem.spectra.batch import batch_spectra
from jaxmem.spectra.counting import Count, count_positive
from jaxmem.spectra.dense import DenseCost, dense_cost, dense_spectrum
from jaxmem.spectra.density import Density, spectral_density
from jaxmem.spectra.estimate import Estimate
from jaxmem.spectra.extreme import extreme_pairs
from jaxmem.spectra.result import Spectrum, Status
from jaxmem.spectra.sharding import sharded_columns
from jaxmem.spectra.single import spectrum

__all__ = [
    "Count",
    "DenseCost",
    "Density",
    "Estimate",
    "Spectrum",
    "Status",
    "batch_spectra",
    "count_positive",
    "dense_cost",
    "dense_spectrum",
    "extreme_pairs",
    "sharded_columns",
    "spectral_density",
    "spectrum",
]
