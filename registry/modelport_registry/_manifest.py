"""A version's manifest: what was published, by whom, and the SHA-256 of every file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import cast

from modelport.names import is_valid_name
from modelport_registry._errors import IntegrityError
from modelport_registry._json import JSON, Fields, parse
from modelport_registry._names import MAX_VERSION

MANIFEST = "manifest.json"
GOLDEN = "golden.npz"
REPORT = "report"
SAVED_MODEL = "saved_model.pb"

FORMAT = 1
"""The format that this code writes; a reader ignores fields that it does not know."""

MAX_MANIFEST_BYTES = 16 << 20

_SHA256 = re.compile(r"[0-9a-f]{64}")
_NO_DIGEST = "0" * 64


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a version."""

    path: str
    """Relative to the version's folder, parts joined by ``/``."""
    size: int
    """Bytes."""
    sha256: str
    """64 lower-case hexadecimal digits."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output of a signature."""

    name: str
    """The name that callers use."""
    dtype: str
    """A key of ``modelport.tensors.DTYPES``; another word where modelport has no such type."""
    shape: tuple[int | None, ...] | None
    """A None in it is a free dimension; None as a whole is an unknown rank."""


@dataclass(frozen=True, slots=True)
class SignatureSpec:
    """One of a model's functions."""

    name: str
    """For example ``serving_default``."""
    inputs: tuple[TensorSpec, ...]
    """Sorted by name."""
    outputs: tuple[TensorSpec, ...]
    """Sorted by name."""

    @property
    def batched(self) -> bool:
        """Whether it has an input, and everything in and out has a free first dimension."""
        tensors = (*self.inputs, *self.outputs)
        return bool(self.inputs) and all(t.shape and t.shape[0] is None for t in tensors)


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where a version comes from."""

    data_sha256: str | None = None
    """The digest of the training data."""
    parameters: Mapping[str, JSON] = field(default_factory=dict[str, JSON])
    """Hyper-parameters."""
    code_revision: str | None = None
    """The training code's commit."""
    source: str | None = None
    """What made it, in words."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that is known about a version."""

    format: int
    """The format's major number."""
    model: str
    """The model's name."""
    version: int
    """The version's number."""
    created: datetime
    """When it was published, UTC."""
    publisher: str
    """User and machine."""
    framework: Mapping[str, str]
    """Versions of what exported it, for example ``tensorflow``."""
    files: tuple[FileEntry, ...]
    """Every file of the version but the manifest, sorted by path."""
    signatures: Mapping[str, SignatureSpec]
    """By name."""
    golden: int
    """The number of golden examples."""
    metrics: Mapping[str, float]
    """Finite numbers, such as accuracy."""
    lineage: Lineage
    """Where it comes from."""
    tags: tuple[str, ...]
    """Words of the publisher's own."""

    @property
    def size_bytes(self) -> int:
        """The size of all files together."""
        return sum(entry.size for entry in self.files)

    def to_json(self) -> str:
        """Returns the manifest as JSON, with the SHA-256 of its own text in the field ``sha256``.

        The digest is taken with 64 zeros in its own place.

        Raises:
            ValueError: if a metric or parameter is something that JSON has not.
        """
        blank = json.dumps(self._document(), indent=1, allow_nan=False) + "\n"
        digest = hashlib.sha256(blank.encode()).hexdigest()
        return blank.replace(_NO_DIGEST, digest, 1)

    @classmethod
    def from_json(cls, data: bytes | str) -> Manifest:
        """Returns the manifest that ``data`` holds; unknown fields are ignored.

        Raises:
            IntegrityError: if it is damaged, or of a newer format.
        """
        fields = parse(data, "the manifest")
        if fields.integer("format", at_least=1) > FORMAT:
            raise IntegrityError(
                f"the manifest has format {fields.integer('format')}, this modelport reads up to {FORMAT}: "
                "upgrade modelport"
            )
        _check_digest(data, fields)
        return _read(fields)

    def _document(self) -> dict[str, JSON]:
        return {
            "sha256": _NO_DIGEST,
            "format": self.format,
            "model": self.model,
            "version": self.version,
            "created": self.created.isoformat(),
            "publisher": self.publisher,
            "framework": dict(self.framework),
            "signatures": {name: _signature_document(s) for name, s in sorted(self.signatures.items())},
            "golden": self.golden,
            "metrics": dict(self.metrics),
            "lineage": {
                "data_sha256": self.lineage.data_sha256,
                "parameters": self.lineage.parameters,
                "code_revision": self.lineage.code_revision,
                "source": self.lineage.source,
            },
            "tags": self.tags,
            "files": [{"path": f.path, "size": f.size, "sha256": f.sha256} for f in self.files],
        }


def check_relative_path(path: str) -> bool:
    """Returns whether ``path`` stays inside a version's folder and is spelled in the one legal way."""
    parts = path.split("/")
    return not any(part in {"", ".", ".."} for part in parts) and path.isprintable() and "\\" not in path


def _check_digest(data: bytes | str, fields: Fields) -> None:
    digest = fields.text("sha256")
    text = data if isinstance(data, str) else data.decode()
    if (
        _SHA256.fullmatch(digest) is None
        or hashlib.sha256(text.replace(digest, _NO_DIGEST, 1).encode()).hexdigest() != digest
    ):
        raise IntegrityError("the manifest is damaged: its text does not match its SHA-256")


def _read(fields: Fields) -> Manifest:
    version = fields.integer("version", at_least=1)
    if version > MAX_VERSION:
        raise fields.wrong("version")
    model = fields.text("model")
    if not is_valid_name(model):
        raise fields.wrong("model")
    return Manifest(
        format=fields.integer("format", at_least=1),
        model=model,
        version=version,
        created=read_time(fields, "created"),
        publisher=fields.text("publisher"),
        framework=fields.mapping("framework", Fields.text),
        files=_read_files(fields),
        signatures=fields.mapping("signatures", _read_signature),
        golden=fields.integer("golden"),
        metrics=fields.mapping("metrics", Fields.number),
        lineage=_read_lineage(fields.child("lineage")),
        tags=fields.texts("tags"),
    )


def read_time(fields: Fields, key: str) -> datetime:
    """Returns the time, with its zone, that stands at ``key``.

    Raises:
        IntegrityError: if there is none.
    """
    try:
        time = datetime.fromisoformat(fields.text(key))
    except ValueError as exc:
        raise fields.wrong(key) from exc
    if time.tzinfo is None:
        raise fields.wrong(key)
    return time


def _read_files(fields: Fields) -> tuple[FileEntry, ...]:
    files = tuple(
        FileEntry(entry.text("path"), entry.integer("size"), entry.text("sha256")) for entry in fields.objects("files")
    )
    legal = all(check_relative_path(f.path) and _SHA256.fullmatch(f.sha256) for f in files)
    if not legal or len({f.path for f in files}) != len(files):
        raise fields.wrong("files")
    return files


def _read_lineage(fields: Fields) -> Lineage:
    return Lineage(
        data_sha256=fields.optional_text("data_sha256"),
        parameters=fields.mapping("parameters", Fields.any),
        code_revision=fields.optional_text("code_revision"),
        source=fields.optional_text("source"),
    )


def _signature_document(signature: SignatureSpec) -> JSON:
    def tensors(specs: tuple[TensorSpec, ...]) -> JSON:
        return [{"name": t.name, "dtype": t.dtype, "shape": t.shape} for t in specs]

    return {"inputs": tensors(signature.inputs), "outputs": tensors(signature.outputs)}


def _read_signature(fields: Fields, name: str) -> SignatureSpec:
    def tensors(key: str) -> tuple[TensorSpec, ...]:
        return tuple(_read_tensor(item) for item in fields.child(name).objects(key))

    return SignatureSpec(name, tensors("inputs"), tensors("outputs"))


def _read_tensor(fields: Fields) -> TensorSpec:
    shape: tuple[int | None, ...] | None = None
    if fields.has("shape"):
        sizes = fields.items("shape")
        if not all(size is None or (type(size) is int and size >= 0) for size in sizes):
            raise fields.wrong("shape")
        shape = tuple(cast("list[int | None]", sizes))
    return TensorSpec(fields.text("name"), fields.text("dtype"), shape)
