"""Torch networks in JAX: a module as a score (`from_torch`), or in torch as it is (`TorchOperator`)."""
