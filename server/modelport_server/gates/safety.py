"""Gate 2: whether everything that a model's graph can run is known to be harmless."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

from modelport.exceptions import ModelportError
from modelport.names import shown
from modelport_registry import JSON, GraphFunction, GraphNode, MetaGraph, read_graph

_SAVING = frozenset({"MergeV2Checkpoints", "Save", "SaveSlices", "SaveV2", "ShardedFilename", "ShardedFilespec"})
_RESTORING = frozenset({"Restore", "RestoreSlice", "RestoreV2", "ShardedFilename", "ShardedFilespec"})
# What TensorFlow 1 leaves behind of the other savers that a program had: their groups have these names.
_OTHER_RESTORE = re.compile(r"save(_\d+)?/restore_all")
_OTHER_SAVE = re.compile(r"save(_\d+)?/(control_dependency|Identity)")
_SHOWN_OPERATIONS = 5


class UnsafeModelError(ModelportError):
    """A graph has an operation that is not known to be harmless; the text names it and where it is."""


def check_safety(saved_model: bytes, allow_ops: Collection[str] = (), *, model: str = "MODEL") -> dict[str, JSON]:
    """Checks every operation of every graph and of their function libraries.

    What saves and restores variables is fine where nothing but the graph's saver reaches it.

    Args:
        saved_model: the bytes of ``saved_model.pb``.
        allow_ops: operations that the model's policy allows besides those that are known to be harmless.
        model: the model's name, for the text that says how to allow more.

    Returns:
        How many distinct operations, nodes and functions there are.

    Raises:
        UnsafeModelError: naming the operations, where the first one is, and how to allow them.
        modelport_registry.InvalidModelError: if the bytes are no SavedModel.
    """
    graphs = read_graph(saved_model)
    trusted = frozenset(allow_ops)
    found: dict[str, _Finding] = {}
    for graph in graphs:
        for finding in _findings(graph, trusted):
            found.setdefault(finding.op, finding)
    if found:
        raise UnsafeModelError(_text(list(found.values()), trusted, model))
    nodes = [node for graph in graphs for _, nodes in _places(graph) for node in nodes]
    functions = sum(len(graph.functions) for graph in graphs)
    return {"operations": len({node.op for node in nodes}), "nodes": len(nodes), "functions": functions}


@cache
def allowed_operations() -> frozenset[str]:
    """Returns the operations that are known to be harmless."""
    return frozenset(_lines("allowed_operations.txt"))


@cache
def refused_operations() -> Mapping[str, str]:
    """Returns why, for each operation that TensorFlow has and that is refused."""
    pairs = (line.partition(": ") for line in _lines("refused_operations.txt"))
    return {name: why for name, _, why in pairs}


def _lines(file: str) -> list[str]:
    text = (resources.files("modelport_server.gates") / file).read_text("ascii")
    return [line for line in text.splitlines() if not line.startswith("#")]


@dataclass(frozen=True, slots=True)
class _Finding:
    op: str
    node: str
    function: str
    """Where the node is; empty for the graph itself."""
    why: str


def _findings(graph: MetaGraph, trusted: frozenset[str]) -> Iterator[_Finding]:
    allowed, known = allowed_operations() | trusted, allowed_operations() | refused_operations().keys()
    saving, restoring = _exempt(graph)
    for name in sorted(graph.functions.keys() & known - trusted):
        yield _Finding(name, "", name, "is the name of a function too, which hides what runs")
    for function, nodes in _places(graph):
        for node in nodes:
            if node.op in allowed or node.op in graph.functions:
                continue
            place = function or node
            saves, restores = node.op in _SAVING and place in saving, node.op in _RESTORING and place in restoring
            if not (saves or restores):
                yield _Finding(node.op, node.name, function, _why(node.op))


def _places(graph: MetaGraph) -> Iterator[tuple[str, tuple[GraphNode, ...]]]:
    """Yields the nodes of the graph itself, under an empty name, and those of each function."""
    yield "", graph.nodes
    for function in graph.functions.values():
        yield function.name, function.nodes


def _why(op: str) -> str:
    return refused_operations().get(op, "is not one of TensorFlow's own operations")


_Places = frozenset[GraphNode | str]
"""Nodes of the graph itself, and functions by name."""


def _exempt(graph: MetaGraph) -> tuple[_Places, _Places]:
    """Returns where saving and where restoring is fine: what the savers reach, each by itself, and nothing else."""
    nodes = {node.name: node for node in graph.nodes}
    save = _upstream(nodes, _savers(graph, nodes, saving=True))
    restore = _upstream(nodes, _savers(graph, nodes, saving=False))
    outside = nodes.keys() - save - restore
    served = _upstream(nodes, outside | graph.named)
    saving, restoring = save - restore - served, restore - save - served
    called = [_called(graph, (nodes[name] for name in group)) for group in (saving, restoring)]
    entered = _called(graph, (nodes[name] for name in nodes.keys() - saving - restoring))
    strangers = graph.functions.keys() - called[0] - called[1]
    others = _closure(graph.functions, entered | graph.exported | strangers)
    return (
        frozenset({nodes[name] for name in saving}) | (called[0] - called[1] - others),
        frozenset({nodes[name] for name in restoring}) | (called[1] - called[0] - others),
    )


def _savers(graph: MetaGraph, nodes: Mapping[str, GraphNode], *, saving: bool) -> set[str]:
    pattern = _OTHER_SAVE if saving else _OTHER_RESTORE
    named = {saver.save if saving else saver.restore for saver in graph.savers}
    return named | {name for name in nodes if pattern.fullmatch(name)}


def _upstream(nodes: Mapping[str, GraphNode], names: Iterable[str]) -> set[str]:
    """Returns the nodes that run when those named do, themselves among them."""
    reached: set[str] = set()
    pending = deque(names)
    while pending:
        name = pending.pop()
        if name in nodes and name not in reached:
            reached.add(name)
            pending.extend(nodes[name].inputs)
    return reached


def _called(graph: MetaGraph, nodes: Iterable[GraphNode]) -> frozenset[str]:
    return _closure(graph.functions, {name for node in nodes for name in node.calls})


def _closure(functions: Mapping[str, GraphFunction], names: Iterable[str]) -> frozenset[str]:
    """Returns the functions that may run when those named do, themselves among them."""
    reached: set[str] = set()
    pending = deque(names)
    while pending:
        name = pending.pop()
        if name in functions and name not in reached:
            reached.add(name)
            function = functions[name]
            pending.extend(function.calls.union(*(node.calls for node in function.nodes)))
    return frozenset(reached)


def _text(findings: list[_Finding], trusted: Collection[str], model: str) -> str:
    first = findings[0]
    where = f"function {shown(first.function)}" if first.function else "the graph itself"
    node = f", node {shown(first.node)}" if first.node else ""
    others = ", ".join(shown(finding.op) for finding in findings[1:_SHOWN_OPERATIONS])
    more = f", and {len(findings) - _SHOWN_OPERATIONS} more" if len(findings) > _SHOWN_OPERATIONS else ""
    also = f"; it also has {others}{more}" if others else ""
    allowed = [*sorted(trusted), *(finding.op for finding in findings[:_SHOWN_OPERATIONS])]  # it sets the whole list
    options = " ".join(f"--allow-op {_quoted(op)}" for op in allowed)
    return (
        f"the operation {shown(first.op)} in {where}{node} {first.why}{also}; "
        f"if you trust the model: modelport policy {model} {options}"
    )


def _quoted(op: str) -> str:
    return op if op.isalnum() else shown(op)
