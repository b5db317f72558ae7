"""The model registry: a folder of versioned SavedModels that publishers and servers share."""

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
from modelport_registry._registry import Registry
from modelport_registry._types import GarbageReport, Golden, JournalEntry, Published, State

__all__ = [
    "JSON",
    "AlreadyExistsError",
    "ConflictError",
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
    "Published",
    "Registry",
    "RegistryError",
    "SignatureSpec",
    "State",
    "TensorSpec",
    "read_graph",
]
