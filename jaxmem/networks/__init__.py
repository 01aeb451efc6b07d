"""Small Flax NNX score networks, called as ``network(x, t, cond)`` on one example, and layers all networks share."""
