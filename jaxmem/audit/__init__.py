"""Which prompts has a model memorized? Prompts × starting noises × sampling steps, every detector, as one run.

``jaxmem.audit(model, prompts, ...)`` calls `jaxmem.audit.engine.audit`. What runs an audit is imported when it is
called: to read one that is there takes no JAX.
"""

import sys
from inspect import Signature, signature
from types import ModuleType
from typing import TYPE_CHECKING, Any

from jaxmem.audit.result import Audit, Directions, Finding, read_audit
from jaxmem.audit.summary import read_results

if TYPE_CHECKING:
    from jaxmem.audit.cost import AuditCost
    from jaxmem.audit.engine import audit, audit_cost


class _CallablePackage(ModuleType):
    """Importing this package binds it to the name ``jaxmem.audit``, which is the function's, so it can be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Audit:
        from jaxmem.audit import engine

        return engine.audit(*args, **kwargs)

    @property
    def __signature__(self) -> Signature:
        """Signature of the call, for help and editors."""
        from jaxmem.audit import engine

        return signature(engine.audit)


sys.modules[__name__].__class__ = _CallablePackage


def __getattr__(name: str) -> Any:
    if name in ("audit", "audit_cost"):
        from jaxmem.audit import engine

        return getattr(engine, name)
    if name == "AuditCost":
        from jaxmem.audit.cost import AuditCost

        return AuditCost
    raise AttributeError(f"module 'jaxmem.audit' has no attribute {name!r}; it has {', '.join(__all__)}")


__all__ = ["Audit", "AuditCost", "Directions", "Finding", "audit", "audit_cost", "read_audit", "read_results"]
