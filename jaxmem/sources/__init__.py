"""Where models come from: one door, `jaxmem.load`, and what lies behind it."""
