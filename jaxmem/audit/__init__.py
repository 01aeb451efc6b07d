"""Which prompts has a model memorized? Prompts × starting noises × sampling steps, every detector, as one run."""

from jaxmem.audit.engine import run_audit
from jaxmem.audit.result import AuditResult, Directions, read_audit

__all__ = ["AuditResult", "Directions", "read_audit", "run_audit"]
