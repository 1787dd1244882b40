"""Workflow definitions: the typed model, its linter, its graph, its compiled form. All pure.
No file, broker or database access lives here, and no expression language: those are handed in.
"""

from factmesh.workflow.compile import CompiledStep, CompiledWorkflow, compile_workflow
from factmesh.workflow.model import (
    STEP_MODELS,
    CallStep,
    NotifyStep,
    RaiseStep,
    Step,
    SwitchStep,
    Workflow,
    WorkflowError,
    parse_workflow,
    register_step,
)

__all__ = [
    "STEP_MODELS",
    "CallStep",
    "CompiledStep",
    "CompiledWorkflow",
    "NotifyStep",
    "RaiseStep",
    "Step",
    "SwitchStep",
    "Workflow",
    "WorkflowError",
    "compile_workflow",
    "parse_workflow",
    "register_step",
]
