"""The page about a comparison of checkpoints, its figure and its table for the terminal."""
