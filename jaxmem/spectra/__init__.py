"""Spectra of operators: dense and Krylov, one point or many, and the count of positive eigenvalues."""

from jaxmem.spectra.batch import batch_spectra
from jaxmem.spectra.counting import Count, count_positive
from jaxmem.spectra.result import Spectrum, Status
from jaxmem.spectra.sharding import sharded_columns
from jaxmem.spectra.single import spectrum

__all__ = ["Count", "Spectrum", "Status", "batch_spectra", "count_positive", "sharded_columns", "spectrum"]
