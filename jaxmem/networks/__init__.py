"""Small Flax NNX score networks, called as ``network(x, t, cond)`` on one example."""
