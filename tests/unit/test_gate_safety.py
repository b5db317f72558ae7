from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from modelport_registry import InvalidModelError, read_graph
from modelport_registry import saved_model_pb2 as pb
from modelport_server.gates.safety import UnsafeModelError, allowed_operations, check_safety, refused_operations

ROOT = Path(__file__).resolve().parent.parent.parent

DANGEROUS = [
    "Abort", "AudioSummary", "CacheDataset", "CacheDatasetV2", "CollectiveReduceV2", "Copy", "CopyHost",
    "CreateSummaryFileWriter", "DataServiceDatasetV4", "DatasetFromGraph", "DatasetToTFRecord", "DebugIdentity",
    "DebugIdentityV3", "DebugNumericSummaryV2", "DecodeProtoV2", "DeserializeIterator", "DistributedSave",
    "EagerPyFunc", "EncodeProto", "FileSystemSetConfiguration", "FixedLengthRecordReaderV2",
    "FixedUnigramCandidateSampler", "GenerateVocabRemapping", "ImmutableConst", "ImportEvent", "InfeedEnqueue",
    "InitializeTableFromTextFileV2", "IteratorFromStringHandle", "LMDBDataset", "LMDBReader", "LoadAndRemapMatrix",
    "LoadDataset", "MatchingFiles", "MergeV2Checkpoints", "NcclAllReduce", "OneShotIterator", "OutfeedDequeue",
    "Print", "PrintV2", "PyFunc", "PyFuncStateless", "ReadFile", "ReaderReadV2", "RecordInput", "Recv",
    "RegisterDatasetV2", "RemoteCall", "Restore", "RestoreSlice", "RestoreV2", "RpcCall", "RpcServerStart", "Save",
    "SaveDatasetV2", "SaveSlices", "SaveV2", "Send", "Skipgram", "SnapshotDatasetV2", "SqlDataset",
    "StatsAggregatorSetSummaryWriter", "TFRecordDatasetV2", "TPUExecute", "TPUPartitionedCall", "TextLineDataset",
    "TextLineReaderV2", "WholeFileReaderV2", "WorkerHeartbeat", "WriteFile", "WriteGraphSummary", "XlaCallModule",
    "XlaCustomCallV2", "XlaHostCompute", "XlaLaunch", "_HostRecv", "_Recv", "_Send", "_XlaRun",
]  # fmt: skip


@pytest.fixture(scope="session")
def graph_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of ``tests.support.graph_models``."""
    folder = tmp_path_factory.mktemp("graph-models")
    command = [sys.executable, "-m", "tests.support.graph_models", str(folder)]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-4000:]
    return folder


def _bytes(folder: Path) -> bytes:
    return (folder / "saved_model.pb").read_bytes()


@pytest.mark.parametrize("name", DANGEROUS)
def test_what_is_dangerous_is_not_allowed(name: str) -> None:
    assert name not in allowed_operations()


def test_the_lists_are_sorted_and_have_nothing_in_common() -> None:
    for names in (list(allowed_operations()), list(refused_operations())):
        assert len(names) > 300
    folder = ROOT / "server" / "modelport_server" / "gates"
    for file in ("allowed_operations.txt", "refused_operations.txt"):
        head, *lines = (folder / file).read_text("ascii").splitlines()
        assert head.startswith("# Operations of TensorFlow 2.")
        names = [line.partition(":")[0] for line in lines if not line.startswith("#")]
        assert names == sorted(set(names))
    assert not allowed_operations() & refused_operations().keys()


def test_models_of_every_kind_are_safe(graph_models: Path, saved_models: Path) -> None:
    folders = [path for path in graph_models.iterdir() if not path.name.startswith("bad-")]
    folders += [*(saved_models / "zoo").iterdir(), saved_models / "versioned-1"]
    assert len(folders) == 14
    for folder in folders:
        figures = check_safety(_bytes(folder))
        assert all(isinstance(number, int) for number in figures.values()), folder
        assert figures["nodes"] >= figures["operations"] > 3, folder  # type: ignore[operator]


@pytest.mark.parametrize(
    ("model", "op", "place"),
    [
        ("bad-read-file", "ReadFile", "function '__inference_inner_"),
        ("bad-python", "EagerPyFunc", "function '__inference_double_"),
        ("bad-saves", "SaveV2", "function '__inference_run_"),
        ("bad-tf1-restore", "SaveV2", "the graph itself, node 'SaveV2'"),
        ("bad-tf1-init", "SaveV2", "the graph itself, node 'SaveV2'"),
    ],
)
def test_bad_models_are_refused_and_can_be_allowed(graph_models: Path, model: str, op: str, place: str) -> None:
    data = _bytes(graph_models / model)
    with pytest.raises(UnsafeModelError) as caught:
        check_safety(data)
    text = str(caught.value)
    assert text.startswith(f"the operation '{op}' in {place}")
    assert text.endswith(f"; if you trust the model: modelport policy MODEL --allow-op {op}")
    assert "\n" not in text
    assert check_safety(data, allow_ops=(op,))["nodes"]


Edit = Callable[[pb.SavedModel], object]


def _function(message: pb.SavedModel, kind: str) -> pb.FunctionDef:
    library = message.meta_graphs[0].graph_def.library
    return next(f for f in library.function if kind in f.signature.name)


def _call(node: pb.NodeDef, name: str) -> None:
    node.name, node.op = "call", "StatefulPartitionedCall"
    node.attr["f"].func.name = name


def _custom(message: pb.SavedModel) -> None:
    message.meta_graphs[0].graph_def.node.add(name="n", op="MyCompany>Fast_Op")


def _saver_from_signature(message: pb.SavedModel) -> None:
    saver = _function(message, "traced_save").signature.name
    _call(_function(message, "signature_wrapper").node_def.add(), saver)


def _saver_nested_in_attributes(message: pb.SavedModel) -> None:
    saver = _function(message, "traced_save").signature.name
    node = _function(message, "signature_wrapper").node_def[0]
    node.attr["branches"].list.func.add(name="other").attr["then"].func.name = saver


def _saver_named_by_text(message: pb.SavedModel) -> None:
    saver = _function(message, "traced_save").signature.name
    _function(message, "signature_wrapper").attr["forward_function_name"].s = saver.encode()


def _saver_as_operation(message: pb.SavedModel) -> None:
    saver = _function(message, "traced_save").signature.name
    _function(message, "signature_wrapper").node_def.add(name="old", op=saver)


def _saver_as_object(message: pb.SavedModel) -> None:
    saver = _function(message, "traced_save").signature.name
    objects = message.meta_graphs[0].object_graph_def
    objects.nodes.add().bare_concrete_function.concrete_function_name = saver


def _saver_as_method(message: pb.SavedModel) -> None:
    saver = _function(message, "traced_save").signature.name
    message.meta_graphs[0].object_graph_def.nodes.add().function.concrete_functions.append(saver)


def _saver_as_peer(message: pb.SavedModel) -> None:
    for kind in ("traced_save", "signature_wrapper"):
        _function(message, kind).attr["api_implements"].s = b"lstm"


def _saver_as_gradient(message: pb.SavedModel) -> None:
    library = message.meta_graphs[0].graph_def.library
    names = [_function(message, kind).signature.name for kind in ("signature_wrapper", "traced_save")]
    library.gradient.add(function_name=names[0], gradient_func=names[1])


def _saver_as_output(message: pb.SavedModel) -> None:
    graph = message.meta_graphs[0]
    graph.signature_def["more"].outputs["y"].name = graph.saver_def.save_tensor_name


def _saver_in_sparse_output(message: pb.SavedModel) -> None:
    graph = message.meta_graphs[0]
    component = graph.signature_def["more"].outputs["y"].composite_tensor.components.add()
    component.coo_sparse.indices_tensor_name = graph.saver_def.save_tensor_name


def _saver_before_output(message: pb.SavedModel) -> None:
    graph = message.meta_graphs[0]
    graph.graph_def.node.add(name="n", op="NoOp", input=["^" + graph.saver_def.save_tensor_name.partition(":")[0]])


def _saver_as_init(message: pb.SavedModel) -> None:
    graph = message.meta_graphs[0]
    node = graph.saver_def.save_tensor_name.partition(":")[0]
    graph.collection_def["saved_model_main_op"].node_list.value.append(node)


def _saver_as_initializer(message: pb.SavedModel) -> None:
    """A variable's definition, whose initializer's length looks like a letter."""
    graph = message.meta_graphs[0]
    node = graph.saver_def.save_tensor_name.partition(":")[0].encode()
    blob = b"\x0a\x01v\x12" + b"A" + node + b"\x1a\x03v:0"
    graph.collection_def["local_variables"].bytes_list.value.append(blob)


def _unused_function(message: pb.SavedModel) -> None:
    function = message.meta_graphs[0].graph_def.library.function.add()
    function.signature.name = "nobody"
    function.node_def.add(name="w", op="SaveV2")


def _save_while_restoring(message: pb.SavedModel) -> None:
    _function(message, "traced_restore").node_def.add(name="w", op="SaveV2")


def _file_while_saving(message: pb.SavedModel) -> None:
    _function(message, "traced_save").node_def.add(name="w", op="WriteFile")


def _function_that_hides(message: pb.SavedModel) -> None:
    function = message.meta_graphs[0].graph_def.library.function.add()
    function.signature.name = "ReadFile"
    message.meta_graphs[0].graph_def.node.add(name="n", op="ReadFile")


def _second_graph(message: pb.SavedModel) -> None:
    message.meta_graphs.add().graph_def.node.add(name="n", op="PyFunc")


@pytest.mark.parametrize(
    ("edit", "op"),
    [
        (_custom, "MyCompany>Fast_Op"),
        (_saver_from_signature, "SaveV2"),
        (_saver_nested_in_attributes, "SaveV2"),
        (_saver_named_by_text, "SaveV2"),
        (_saver_as_operation, "SaveV2"),
        (_saver_as_object, "SaveV2"),
        (_saver_as_method, "SaveV2"),
        (_saver_as_peer, "SaveV2"),
        (_saver_as_gradient, "SaveV2"),
        (_saver_as_output, "SaveV2"),
        (_saver_in_sparse_output, "SaveV2"),
        (_saver_before_output, "SaveV2"),
        (_saver_as_init, "SaveV2"),
        (_saver_as_initializer, "SaveV2"),
        (_unused_function, "SaveV2"),
        (_save_while_restoring, "SaveV2"),
        (_file_while_saving, "WriteFile"),
        (_function_that_hides, "ReadFile"),
        (_second_graph, "PyFunc"),
    ],
)
def test_no_way_around(saved_models: Path, edit: Edit, op: str) -> None:
    message = pb.SavedModel.FromString(_bytes(saved_models / "versioned-1"))
    edit(message)
    with pytest.raises(UnsafeModelError) as caught:
        check_safety(message.SerializeToString())
    assert f"'{op}'" in str(caught.value)


def test_a_custom_operation_is_told_from_one_of_tensorflow(saved_models: Path) -> None:
    message = pb.SavedModel.FromString(_bytes(saved_models / "versioned-1"))
    _custom(message)
    with pytest.raises(UnsafeModelError, match=r"is not one of TensorFlow's own operations.*'MyCompany>Fast_Op'"):
        check_safety(message.SerializeToString())


def test_many_operations_are_told_in_one_line() -> None:
    message = pb.SavedModel()
    graph = message.meta_graphs.add().graph_def
    for number in range(9):
        graph.node.add(name=f"n{number}", op=f"Own{number}")
    with pytest.raises(UnsafeModelError, match=r"'Own4', and 4 more; .*--allow-op Own0 --allow-op Own1"):
        check_safety(message.SerializeToString())


def test_what_is_allowed_already_stays_allowed() -> None:
    message = pb.SavedModel()
    message.meta_graphs.add().graph_def.node.add(name="n", op="Own")
    with pytest.raises(UnsafeModelError, match=r"modelport policy MODEL --allow-op Mine --allow-op Own$"):
        check_safety(message.SerializeToString(), allow_ops=("Mine",))


def test_what_is_no_graph_is_refused() -> None:
    with pytest.raises(InvalidModelError, match="damaged or not a SavedModel"):
        read_graph(b"\xff\xff not protobuf")
    message = pb.SavedModel()
    library = message.meta_graphs.add().graph_def.library
    for _ in range(2):
        library.function.add().signature.name = "f"
    with pytest.raises(InvalidModelError, match="two functions of one name"):
        read_graph(message.SerializeToString())
