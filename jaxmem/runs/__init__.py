"""Run folders: what is in one, how it is written, and how interrupted work goes on."""
