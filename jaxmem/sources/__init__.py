"""Where models come from: one door, `jaxmem.load`, and what lies behind it."""

from jaxmem.extras import require

require("audit", "jaxmem.load")
