"""Views on a run directory: no mathematics beyond means and counts, nothing but what the run wrote."""

from jaxmem.extras import require

require("audit", "pages and figures")
