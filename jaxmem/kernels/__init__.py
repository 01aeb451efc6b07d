"""Array operations that the networks share, each with its own derivative: attention, convolution, normalization."""
