"""The contract kit, for authors of channel layers: does a layer keep what ``BaseChannelLayer`` promises?

Rules:
- ``checks`` are examples: plain async functions over a factory, one clause of the contract each, that need no test runner.
  ``run_checks`` runs them all.
- ``contract_machine`` makes a Hypothesis state machine that compares a layer with a plain-dict model, step by step.
- both tell what broke: a ``ContractViolation`` names the clause and says what was seen.
- time is a ``Clock`` that the kit moves; nothing sleeps. The kit never imports a layer of ours.

It needs the extra ``anyio_channels[testing]``.
"""

from __future__ import annotations

from .checks import CHECKS, Check, Clock, ContractViolation, Features, LayerFactory, run_checks
from .machine import contract_machine

__all__ = [
    "CHECKS",
    "Check",
    "Clock",
    "ContractViolation",
    "Features",
    "LayerFactory",
    "contract_machine",
    "run_checks",
]
