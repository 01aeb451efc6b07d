"""When did it begin? Audits of several checkpoints of one training, against the training steps.

`jaxmem.compare` reads their runs; to read them takes no JAX.
"""

from jaxmem.comparison.checkpoint import Checkpoint, Spread
from jaxmem.comparison.onset import Advice
from jaxmem.comparison.result import Comparison, compare

__all__ = ["Advice", "Checkpoint", "Comparison", "Spread", "compare"]
