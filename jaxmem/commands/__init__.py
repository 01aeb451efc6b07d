"""The commands: a dataclass of flags each, whose call does the work. JAX loads only then."""

from jaxmem.extras import require

require("audit", "the command line")
