"""Views on a run directory: no mathematics beyond means and counts, nothing but what the run wrote."""
