"""Statistics of scores and spectra that say whether a sample is memorized; functions and arrays only, no networks."""
