"""The commands: a dataclass of flags each, whose call does the work. JAX loads only then."""
