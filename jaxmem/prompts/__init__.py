"""Lists of prompts from text, tables, JSON, Parquet and folders; a label (memorized or not) and a category if known."""

from jaxmem.prompts.cells import RESULTS_COLUMNS, STANDING_COLUMNS, as_cell, from_cell, quoted_cell
from jaxmem.prompts.files import gather, read_prompts
from jaxmem.prompts.prompt import NO_PROMPT, Prompt, as_prompts, first_of_each, merge

__all__ = [
    "NO_PROMPT",
    "RESULTS_COLUMNS",
    "STANDING_COLUMNS",
    "Prompt",
    "as_cell",
    "as_prompts",
    "first_of_each",
    "from_cell",
    "gather",
    "merge",
    "quoted_cell",
    "read_prompts",
]
