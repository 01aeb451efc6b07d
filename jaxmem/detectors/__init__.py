"""Detectors of memorization: one entry each, the published ones and your own.

`Detector` is an entry; `register` makes one known to every audit, and ``jaxmem.audit(..., detectors=[...])`` takes
names and entries for one audit. What an entry can ask for is in `jaxmem.detectors.evidence` and, of spectra, in
`jaxmem.detectors.evidence_at_timesteps`.
"""

from jaxmem.detectors import published, spectral
from jaxmem.detectors.entry import Detector, choose, columns, register, registered, require_evidence, table
from jaxmem.detectors.evidence import (
    EpsDifferences,
    Evidence,
    HessianProducts,
    Images,
    Pairs,
    Products,
    ScorePairs,
    Setting,
    StartPairs,
    TwoPairs,
)
from jaxmem.detectors.evidence_at_timesteps import Counts, CountsAt, DenoisingErrors, Eigenvalues, ErrorsAt, SpectrumAt
from jaxmem.detectors.published import curvature_map

for _detector in (*published.DETECTORS, *spectral.DETECTORS):
    register(_detector)

__all__ = [
    "Counts",
    "CountsAt",
    "DenoisingErrors",
    "Detector",
    "Eigenvalues",
    "EpsDifferences",
    "ErrorsAt",
    "Evidence",
    "HessianProducts",
    "Images",
    "Pairs",
    "Products",
    "ScorePairs",
    "Setting",
    "SpectrumAt",
    "StartPairs",
    "TwoPairs",
    "choose",
    "columns",
    "curvature_map",
    "register",
    "registered",
    "require_evidence",
    "table",
]
