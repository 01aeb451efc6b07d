"""Where timesteps lie on the usual scale of 1,000, and which of them an audit looks at by default and judges by.

The numbers were found on Stable Diffusion's table. Of another schedule a timestep counts as its place there:
`jaxmem.diffusion.Schedule.usual_timestep`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# Late enough to see what the picture is, early enough for a network to have resolved how sharp its density is: at
# smaller sigma a learned peak is blunter than the exact one, and copies seem to have freedom.
JUDGED = 281.0  #: see `UsualScale.judged`
EARLIEST_JUDGED = 501.0  #: earlier hardly a direction is free, whatever the prompt
DEFAULTS = (481.0, 281.0, 41.0)  #: of spectra, after the first
# Curvature differs from that of pure noise by alpha², of which float32 then still holds two digits.
LEAST_ALPHA = 2.0**-8


@dataclass(frozen=True)
class UsualScale:
    """The places of a sampler's timesteps, by timestep; one that is not there is its own place."""

    places: Mapping[int, float] = field(default_factory=dict)

    def place(self, timestep: int) -> float:
        return self.places.get(int(timestep), float(timestep))

    def nearest(self, place: float, timesteps: Sequence[int]) -> int:
        """Choose the timestep that is the nearest to a place on the usual scale."""
        return min(timesteps, key=lambda t: abs(self.place(t) - place))

    def is_late(self, timestep: int) -> bool:
        """Whether a lack of freedom there means something."""
        return self.place(timestep) <= EARLIEST_JUDGED

    def judged(self, timesteps: Sequence[int]) -> int:
        """Choose the timestep at which freedom is judged: the nearest to `JUDGED`, among late ones if there are any."""
        return self.nearest(JUDGED, [t for t in timesteps if self.is_late(t)] or timesteps)
