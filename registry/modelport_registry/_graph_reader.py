"""Reads the operations of a ``saved_model.pb`` without TensorFlow."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from google.protobuf.message import DecodeError

from modelport_registry import saved_model_pb2 as pb
from modelport_registry._errors import InvalidModelError
from modelport_registry._graph import GraphFunction, GraphNode, MetaGraph, Saver

_API = "api_implements"
_SAVERS = "savers"
_NAME = re.compile(rb"[A-Za-z0-9.][A-Za-z0-9_.\\/>-]*")


def read(data: bytes) -> tuple[MetaGraph, ...]:
    """Returns the graphs, as ``read_graph`` does."""
    try:
        message = pb.SavedModel.FromString(data)
    except DecodeError as exc:
        raise InvalidModelError("saved_model.pb is damaged or not a SavedModel: export the model again") from exc
    return tuple(_meta_graph(graph) for graph in message.meta_graphs)


def _meta_graph(message: pb.MetaGraph) -> MetaGraph:
    library = message.graph_def.library
    names = frozenset(function.signature.name for function in library.function)
    if len(names) != len(library.function):
        raise InvalidModelError("saved_model.pb has two functions of one name: export the model again")
    nodes = tuple(_node(node, names) for node in message.graph_def.node)
    return MetaGraph(
        tags=tuple(message.meta_info.tags),
        nodes=nodes,
        functions=_functions(library, names),
        savers=tuple(_savers(message)),
        named=frozenset(_signature_nodes(message)) | _collection_nodes(message, {node.name for node in nodes}),
        exported=frozenset(_exported(message.object_graph_def)),
    )


def _node(message: pb.NodeDef, names: frozenset[str]) -> GraphNode:
    calls = frozenset({message.op, *_mentioned(message.attr)}) & names
    return GraphNode(message.name, message.op, tuple(map(_node_name, message.input)), calls)


def _functions(library: pb.FunctionDefLibrary, names: frozenset[str]) -> dict[str, GraphFunction]:
    others = _implied(library)
    return {
        function.signature.name: GraphFunction(
            function.signature.name,
            tuple(_node(node, names) for node in function.node_def),
            frozenset({*_mentioned(function.attr), *others.get(function.signature.name, ())}) & names,
        )
        for function in library.function
    }


def _implied(library: pb.FunctionDefLibrary) -> dict[str, set[str]]:
    """Returns what may run because of a function without being named by it."""
    implied: dict[str, set[str]] = {}
    for gradient in library.gradient:
        implied.setdefault(gradient.function_name, set()).add(gradient.gradient_func)
    peers: dict[bytes, set[str]] = {}
    for function in library.function:  # TensorFlow's optimizer picks one of those that implement one interface
        if _API in function.attr:
            peers.setdefault(function.attr[_API].s, set()).add(function.signature.name)
    for group in peers.values():
        for name in group:
            implied.setdefault(name, set()).update(group)
    return implied


def _mentioned(attributes: Mapping[str, pb.AttrValue]) -> Iterator[str]:
    """Yields the functions that attributes name, and their texts: some attributes name functions by a text."""
    pending = list(attributes.values())
    while pending:
        value = pending.pop()
        functions = [value.func] if value.HasField("func") else []
        texts = [value.s] if value.s else []
        if value.HasField("list"):
            functions.extend(value.list.func)
            texts.extend(value.list.s)
        for function in functions:
            yield function.name
            pending.extend(function.attr.values())
        yield from (text.decode("utf-8", "replace") for text in texts)


def _savers(message: pb.MetaGraph) -> Iterator[Saver]:
    savers = [message.saver_def]
    for data in message.collection_def[_SAVERS].bytes_list.value if _SAVERS in message.collection_def else ():
        try:
            savers.append(pb.SaverDef.FromString(data))
        except DecodeError as exc:
            raise InvalidModelError("saved_model.pb has a damaged saver: export the model again") from exc
    for saver in savers:
        yield Saver(_node_name(saver.save_tensor_name), _node_name(saver.restore_op_name))


def _signature_nodes(message: pb.MetaGraph) -> Iterator[str]:
    for signature in message.signature_def.values():
        for info in (*signature.inputs.values(), *signature.outputs.values()):
            yield from map(_node_name, _tensor_names(info))


def _tensor_names(info: pb.TensorInfo) -> Iterator[str]:
    sparse = info.coo_sparse
    yield from (info.name, sparse.values_tensor_name, sparse.indices_tensor_name, sparse.dense_shape_tensor_name)
    for component in info.composite_tensor.components:
        yield from _tensor_names(component)


def _collection_nodes(message: pb.MetaGraph, nodes: set[str]) -> frozenset[str]:
    texts: set[str] = set()
    for key, collection in message.collection_def.items():
        texts.update(map(_node_name, collection.node_list.value))
        blobs: Iterable[bytes] = (*collection.bytes_list.value, *collection.any_list.value)
        for blob in blobs if key != _SAVERS else ():
            texts.update(_names_in(blob))
    return frozenset(texts & nodes)


def _names_in(blob: bytes) -> Iterator[str]:
    """Yields whatever could be a node's name in a message of any kind, such as the initializer of a variable."""
    for match in _NAME.finditer(blob):
        text = match.group().decode()
        yield text
        yield text[1:]  # the byte before a name is its length, and may look like a part of it


def _exported(message: pb.SavedObjectGraph) -> Iterator[str]:
    yield from message.concrete_functions
    for node in message.nodes:
        yield from node.function.concrete_functions
        yield node.bare_concrete_function.concrete_function_name


def _node_name(text: str) -> str:
    """Returns the node of a tensor ``node:0``, of one in a function ``node:out:0``, or of a control input ``^node``."""
    return text.removeprefix("^").partition(":")[0]
