"""Which prompts has a model memorized? Prompts × starting noises × sampling steps, every detector, as one run."""

from jaxmem.audit.cost import AuditCost
from jaxmem.audit.engine import audit, audit_cost
from jaxmem.audit.result import Audit, Directions, Finding, read_audit
from jaxmem.audit.summary import read_results

__all__ = ["Audit", "AuditCost", "Directions", "Finding", "audit", "audit_cost", "read_audit", "read_results"]
