"""Local intrinsic dimension: how many directions the data has at a point, estimated from a score.

A memorized image is a point of dimension 0, or of far fewer than its neighbours. Each estimator comes as published, and
says where released code differs; all take one point, one timestep and a score by the contract (`jaxmem.score`).

- `flipd`: from the trace of the Hessian and the score, at the point itself (Kamkari et al. 2024).
- `fpregress`: from the growth of the density with the noise, over several timesteps (the same paper).
- `normal_bundle`: from the directions of scores around the point (Stanczuk et al. 2022).
- `spectral_gap`: from a gap in the spectrum of the Hessian (Ventura et al. 2024).
- `denoising_dimension`: from the error of denoising, by forward passes alone.
- `jaxmem.memorization.sharpness.tangent_count`: from the eigenvalues above -1/(2σ²).
"""

from jaxmem.dimension.denoising import denoising_dimension
from jaxmem.dimension.density import flipd, fpregress
from jaxmem.dimension.directions import normal_bundle
from jaxmem.dimension.result import Dimension
from jaxmem.memorization.sharpness import spectral_gap

__all__ = ["Dimension", "denoising_dimension", "flipd", "fpregress", "normal_bundle", "spectral_gap"]
