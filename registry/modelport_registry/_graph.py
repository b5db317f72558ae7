"""Which operations a SavedModel runs, and from where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GraphNode:
    """One node of a graph or of a function."""

    name: str
    """Unique in its graph or function."""
    op: str
    """The operation's name, or that of a function which it calls."""
    inputs: tuple[str, ...]
    """The names of the nodes that it takes its inputs from or runs after."""
    calls: frozenset[str]
    """The functions that it names: as its operation or in an attribute, nested ones too."""


@dataclass(frozen=True, slots=True)
class GraphFunction:
    """One function of a graph's library."""

    name: str
    """Unique in its library."""
    nodes: tuple[GraphNode, ...]
    """Its body."""
    calls: frozenset[str]
    """The functions that its attributes name, that are its gradient, or that may run in its place."""


@dataclass(frozen=True, slots=True)
class Saver:
    """What a graph has for saving and restoring its variables."""

    save: str
    """The name of the node that saves."""
    restore: str
    """The name of the node that restores."""


@dataclass(frozen=True, slots=True)
class MetaGraph:
    """One of a SavedModel's graphs, with its functions."""

    tags: tuple[str, ...]
    """For example ``serve``."""
    nodes: tuple[GraphNode, ...]
    """The graph's own nodes."""
    functions: Mapping[str, GraphFunction]
    """The whole function library by name."""
    savers: tuple[Saver, ...]
    """What saves and restores."""
    named: frozenset[str]
    """The names of nodes that signatures and collections speak of, initializers among them."""
    exported: frozenset[str]
    """The names of functions that the object graph speaks of."""


def read_graph(data: bytes) -> tuple[MetaGraph, ...]:
    """Returns every graph of the bytes of a ``saved_model.pb``, whatever its tags.

    Raises:
        InvalidModelError: if they are no SavedModel, or two functions of a library have one name.
    """
    from modelport_registry import _graph_reader  # protobuf takes its time to import

    return _graph_reader.read(data)
