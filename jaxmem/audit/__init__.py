"""Which prompts has a model memorized? Prompts × starting noises × sampling steps, every detector, as one run.

``jaxmem.audit(model, prompts, ...)`` calls `jaxmem.audit.engine.audit`.
"""

import sys
from inspect import signature
from types import ModuleType

from jaxmem.audit.cost import AuditCost
from jaxmem.audit.engine import audit, audit_cost
from jaxmem.audit.result import Audit, Directions, Finding, read_audit
from jaxmem.audit.summary import read_results


class _CallablePackage(ModuleType):
    """Importing this package binds it to the name ``jaxmem.audit``, which is the function's, so it can be called."""

    __call__ = staticmethod(audit)


sys.modules[__name__].__class__ = _CallablePackage
__signature__ = signature(audit)  # of the call, for help and editors

__all__ = ["Audit", "AuditCost", "Directions", "Finding", "audit", "audit_cost", "read_audit", "read_results"]
