"""Which prompts has a model memorized? Prompts × starting noises × sampling steps, every detector, as one run."""

from jaxmem.audit.engine import run_audit
from jaxmem.audit.result import AuditResult, Directions, read_audit
from jaxmem.audit.summary import read_results

__all__ = ["AuditResult", "Directions", "read_audit", "read_results", "run_audit"]
