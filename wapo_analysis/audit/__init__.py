"""What a trainer really computes, told from the recorded tokens alone."""

from wapo_analysis.audit.judge import audit
from wapo_analysis.audit.result import Audit, Statement

__all__ = ["Audit", "Statement", "audit"]
