"""Writes the lists of TensorFlow's operations that the safety gate reads; run it after an upgrade of TensorFlow.

Only names are taken, from TensorFlow's registry: those that it publishes as ``tf.raw_ops``, which leaves out
what its own optimizer and its tests use. Review the difference before you commit it: whatever is new and
matches no rule below is allowed.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

FOLDER = Path(__file__).parent / "modelport_server" / "gates"
ALLOWED, REFUSED = FOLDER / "allowed_operations.txt", FOLDER / "refused_operations.txt"

_IN_MEMORY = frozenset({
    "AnonymousIteratorV2", "AnonymousIteratorV3", "BatchDataset", "BatchDatasetV2", "ConcatenateDataset",
    "DatasetCardinality", "DatasetToSingleElement", "DeleteIterator", "FilterDataset", "FlatMapDataset",
    "InitializeTableFromDataset", "InterleaveDataset", "IteratorGetNext", "IteratorGetNextAsOptional",
    "IteratorGetNextSync", "MakeIterator", "MapAndBatchDataset", "MapDataset", "OptionsDataset",
    "PaddedBatchDataset", "PaddedBatchDatasetV2", "ParallelMapDataset", "ParallelMapDatasetV2",
    "ParseExampleDataset", "ParseExampleDatasetV2", "PrefetchDataset", "RangeDataset", "RebatchDataset",
    "RebatchDatasetV2", "ReduceDataset", "RepeatDataset", "ScanDataset", "ShardDataset", "ShuffleDataset",
    "ShuffleDatasetV2", "ShuffleDatasetV3", "SkipDataset", "SparseTensorSliceDataset", "TakeDataset",
    "TakeWhileDataset", "TensorDataset", "TensorSliceDataset", "UnbatchDataset", "UniqueDataset", "WindowDataset",
    "ZipDataset",
})  # fmt: skip
"""Data sets that hold what they are given and call functions of the graph, which are looked at themselves."""

_RULES = {
    "reads or writes files": (
        r"(Read|Write|Matching)Files?|.*Reader(V2)?|Reader.*|Save.*|Restore.*|Sharded.*|MergeV2Checkpoints"
        r"|LoadAndRemapMatrix|GenerateVocabRemapping|InitializeTableFromTextFile.*|ImmutableConst|RecordInput"
        r"|FixedUnigramCandidateSampler|DecodeProtoV2|EncodeProto|FileSystemSetConfiguration|DumpTensor|Print.*"
        r"|(Experimental)?(CSV|FixedLengthRecord|LMDB|MatchingFiles|Sql|TFRecord|TextLine|Cache|Load)Dataset(V\d)?"
        r"|(Experimental)?DatasetToTFRecord|.*Snapshot.*Dataset.*|DistributedSave|(?!BoostedTrees).*Summary.*|ImportEvent|Debug.*"
        r"|Copy|CopyHost|.*StatsAggregator.*"
    ),
    "talks to other processes": (
        r"Rpc.*|DataService.*|RegisterDataset.*|Send|Recv|RemoteCall|Collective.*|Nccl.*|CrossReplicaSum|AllToAll"
    ),
    "runs Python": r".*PyFunc.*",
    "ends the process": r"Abort|WorkerHeartbeat",
    "is meant for other devices": (
        r".*(TPU|Tpu|SparseCore).*|Infeed.*|Outfeed.*|Prelinearize.*|.*Xla.*|ConvertToCooTensor|GetMinibatch.*"
        r"|StoreMinibatchStatistics.*"
    ),
    "keeps a session's state": r"GetSession.*|DeleteSessionTensor|.*ThreadPool.*|.*MemoryCache",
    "feeds training from a data pipeline": r".*Dataset.*|.*Iterator.*|GetOptions|RewriteDataset|DummyIterationCounter",
}
"""Why an operation is refused, and which names it is about; the first that matches a whole name holds."""


def names() -> list[str]:
    """Returns the operations that TensorFlow publishes, sorted."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from importlib import import_module

    tensorflow = import_module("tensorflow")  # a tool for developers: the server's own code never does this
    return sorted(name for name in dir(tensorflow.raw_ops) if name[0].isupper())


def reason(name: str) -> str:
    """Returns why ``name`` is refused; nothing if it is allowed."""
    if name in _IN_MEMORY:
        return ""
    return next((why for why, pattern in _RULES.items() if re.fullmatch(pattern, name)), "")


def main() -> None:
    """Writes both files."""
    version = import_version()
    found = {name: reason(name) for name in names()}
    head = f"# Operations of TensorFlow {version} that {{}}, sorted.\n# Written by server/make_operations.py.\n"
    allowed = [f"{name}\n" for name, why in found.items() if not why]
    refused = [f"{name}: {why}\n" for name, why in found.items() if why]
    ALLOWED.write_text(head.format("the safety gate takes to be safe") + "".join(allowed))
    REFUSED.write_text(head.format("it does not, each with why") + "".join(refused))
    print(f"{len(allowed)} allowed, {len(refused)} refused")


def import_version() -> str:
    """Returns TensorFlow's version."""
    from importlib.metadata import version

    return version("tensorflow")


if __name__ == "__main__":
    main()
