"""The model registry: a folder of versioned SavedModels that publishers and servers share."""

from modelport_registry import transitions
from modelport_registry._errors import (
    AlreadyExistsError,
    ConflictError,
    IntegrityError,
    InvalidModelError,
    NotFoundError,
    RegistryError,
)
from modelport_registry._graph import GraphFunction, GraphNode, MetaGraph, read_graph
from modelport_registry._json import JSON
from modelport_registry._manifest import FileEntry, Lineage, Manifest, SignatureSpec, TensorSpec
from modelport_registry._policy import RolloutPolicy, Step, StepKind, Strategy, parse_step, parse_strategy
from modelport_registry._registry import Registry
from modelport_registry._rollout import Ended, Phase, Rejection, Rollout
from modelport_registry._signatures import read_signatures, with_signature
from modelport_registry._types import GarbageReport, Golden, JournalEntry, Published, State
from modelport_registry._wait import check_server, wait_until_stable

__all__ = [
    "JSON",
    "AlreadyExistsError",
    "ConflictError",
    "Ended",
    "FileEntry",
    "GarbageReport",
    "Golden",
    "GraphFunction",
    "GraphNode",
    "IntegrityError",
    "InvalidModelError",
    "JournalEntry",
    "Lineage",
    "Manifest",
    "MetaGraph",
    "NotFoundError",
    "Phase",
    "Published",
    "Registry",
    "RegistryError",
    "Rejection",
    "Rollout",
    "RolloutPolicy",
    "SignatureSpec",
    "State",
    "Step",
    "StepKind",
    "Strategy",
    "TensorSpec",
    "check_server",
    "parse_step",
    "parse_strategy",
    "read_graph",
    "read_signatures",
    "transitions",
    "wait_until_stable",
    "with_signature",
]
