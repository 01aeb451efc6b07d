"""The paper's experiments: each a configuration and a run directory; only `jaxmem.report` draws."""
