"""Golden examples: inputs, and the outputs that the publisher computed for them; no pickle.

The file is a plain ``.npz`` of uncompressed arrays ``0``, ``1``, ... and one called ``index``: UTF-8
JSON as uint8, which says what each array is. Strings are kept as uint8 in the wire format's layout
(``modelport.tensors.pack_strings``), bfloat16 as uint16. Equal examples give equal bytes.
"""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelport import tensors
from modelport.names import DEFAULT_SIGNATURE, shown
from modelport_registry._errors import IntegrityError, InvalidModelError
from modelport_registry._files import read_bounded
from modelport_registry._json import JSON, Fields, parse
from modelport_registry._manifest import SignatureSpec, TensorSpec
from modelport_registry._types import Golden

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

MAX_GOLDEN_BYTES = 1 << 30

_FORMAT = 1
_INDEX = "index"
_EPOCH = (1980, 1, 1, 0, 0, 0)
_NPZ_KEY = re.compile(r"(?:(?P<signature>.+?)/)?(?P<kind>inputs|outputs)/(?P<name>.+)", re.DOTALL)
_BYTE = np.dtype("uint8")
_DAMAGED = "golden.npz is damaged"


def example_count(golden: Sequence[Golden], signatures: Mapping[str, SignatureSpec]) -> int:
    """Returns the number of examples: the rows of batched signatures, one per call of others."""
    return sum(len(next(iter(one.inputs.values()))) if signatures[one.signature].batched else 1 for one in golden)


def check_golden(golden: Sequence[Golden], signatures: Mapping[str, SignatureSpec]) -> None:
    """Checks that the examples fit the signatures.

    Raises:
        InvalidModelError: at the first name, type or shape that does not.
    """
    for one in golden:
        signature = signatures.get(one.signature)
        if signature is None:
            raise InvalidModelError(
                f"golden examples are for the signature {shown(one.signature)}, "
                f"the model has: {', '.join(map(shown, signatures))}"
            )
        _check_tolerance(one)
        _check_names(one, signature)
        arrays = [*_pairs("input", one.inputs, signature.inputs)]
        arrays += _pairs("output", one.outputs, signature.outputs)
        for what, array, spec in arrays:
            _check_tensor(what, array, spec)
        if signature.batched:
            _check_rows(one.signature, [(what, len(array)) for what, array, _ in arrays])


def dump_golden(golden: Sequence[Golden]) -> bytes:
    """Returns the bytes of ``golden.npz``.

    Raises:
        InvalidModelError: if an array cannot be stored, or all together are too large.
    """
    arrays: list[Array] = []

    def entries(values: Mapping[str, Array]) -> JSON:
        documents: dict[str, JSON] = {}
        for name, value in sorted(values.items()):
            documents[name] = {
                "array": str(len(arrays)), "dtype": tensors.dtype_of(value).name, "shape": value.shape
            }  # fmt: skip
            arrays.append(_stored(value))
        return documents

    try:
        items: list[JSON] = [
            {
                "signature": one.signature,
                "rtol": one.rtol,
                "atol": one.atol,
                "inputs": entries(one.inputs),
                "outputs": entries(one.outputs),
            }
            for one in golden
        ]
    except tensors.TensorError as exc:
        raise InvalidModelError(f"golden examples: {exc}") from exc
    index = json.dumps({"format": _FORMAT, "golden": items}, allow_nan=False).encode()
    named = [(_INDEX, np.frombuffer(index, _BYTE)), *((str(i), a) for i, a in enumerate(arrays))]
    if sum(array.nbytes for _, array in named) > MAX_GOLDEN_BYTES * 0.99:
        raise InvalidModelError(
            f"golden examples take more than {MAX_GOLDEN_BYTES >> 20} MiB: a few dozen rows are enough"
        )
    return _zip(named)


def load_golden(data: bytes) -> list[Golden]:
    """Returns the examples that the bytes of a ``golden.npz`` hold; arrays are read-only.

    Raises:
        IntegrityError: if they are damaged or of a newer format.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return _read(archive)
    except IntegrityError:
        raise
    # What zipfile and numpy raise on damaged input is not one family.
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError, RuntimeError, OSError, SyntaxError) as exc:
        raise IntegrityError(_DAMAGED) from exc


def read_npz(path: Path, *, rtol: float | None = None, atol: float | None = None) -> list[Golden]:
    """Returns the examples of an ``.npz`` that people make, or of a published version's ``golden.npz``.

    In one that people make, arrays are called ``inputs/NAME`` and ``outputs/NAME`` for ``serving_default``,
    or ``SIGNATURE/inputs/NAME`` and ``SIGNATURE/outputs/NAME``.

    Args:
        path: the file.
        rtol: relative tolerance of the outputs; None for what a version's file says, or else the default.
        atol: absolute tolerance, in the same way.

    Raises:
        InvalidModelError: if it cannot be read, or an array is called otherwise.
    """
    examples = _read_stored(path) if _is_stored(path) else _read_own(path)
    return [
        replace(one, rtol=one.rtol if rtol is None else rtol, atol=one.atol if atol is None else atol)
        for one in examples
    ]


def _is_stored(path: Path) -> bool:
    """Returns whether a file has the names of one that ``dump_golden`` made."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError):
        return False
    return _INDEX in names and all(name.isdigit() for name in names - {_INDEX})


def _read_stored(path: Path) -> list[Golden]:
    try:
        return load_golden(read_bounded(path.resolve(), MAX_GOLDEN_BYTES, IntegrityError))
    except (IntegrityError, OSError) as exc:
        raise InvalidModelError(f"{shown(str(path))} can't be read: {exc}") from exc


def _read_own(path: Path) -> list[Golden]:
    groups: dict[str, dict[str, dict[str, Array]]] = {}
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):  # numpy would read a lone .npy as well
                raise zipfile.BadZipFile
        with np.load(path, allow_pickle=False) as archive:
            for key in archive.files:
                match = _NPZ_KEY.fullmatch(key)
                if match is None:
                    raise InvalidModelError(
                        f"{shown(path.name)} has an array {shown(key)}: call it inputs/NAME or outputs/NAME, "
                        "or SIGNATURE/inputs/NAME"
                    )
                group = groups.setdefault(match["signature"] or DEFAULT_SIGNATURE, {"inputs": {}, "outputs": {}})
                group[match["kind"]][match["name"]] = _loaded(archive[key])
    except FileNotFoundError as exc:
        raise InvalidModelError(f"there is no file {shown(str(path))}") from exc
    except (zipfile.BadZipFile, ValueError, AttributeError, EOFError, OSError) as exc:
        raise InvalidModelError(f"{shown(str(path))} is not a readable .npz of plain arrays") from exc
    return [Golden(name, group["inputs"], group["outputs"]) for name, group in sorted(groups.items())]


def _loaded(array: Array) -> Array:
    # numpy forgets bfloat16 when it saves, and leaves two raw bytes.
    return tensors.bfloat16_from_bits(array.view(np.uint16)) if array.dtype == np.dtype("V2") else array


def _pairs(kind: str, values: Mapping[str, Array], specs: Sequence[TensorSpec]) -> list[tuple[str, Array, TensorSpec]]:
    return [(f"{kind} {shown(s.name)}", np.asarray(values[s.name]), s) for s in specs if s.name in values]


def _check_tolerance(one: Golden) -> None:
    if not all(math.isfinite(number) and number >= 0 for number in (one.rtol, one.atol)):
        raise InvalidModelError(f"golden tolerances are 0 or more, not rtol {one.rtol}, atol {one.atol}")


def _check_names(one: Golden, signature: SignatureSpec) -> None:
    inputs, outputs = {s.name for s in signature.inputs}, {s.name for s in signature.outputs}
    if missing := sorted(inputs - one.inputs.keys()):
        raise InvalidModelError(f"golden examples lack the input {shown(missing[0])} of {shown(one.signature)}")
    for kind, given, known in (("input", one.inputs, inputs), ("output", one.outputs, outputs)):
        if extra := sorted(given.keys() - known):
            raise InvalidModelError(
                f"golden examples have the {kind} {shown(extra[0])}, {shown(one.signature)} has: "
                f"{', '.join(map(shown, sorted(known))) or 'none'}"
            )
    if not one.outputs:
        raise InvalidModelError(f"golden examples for {shown(one.signature)} have no outputs to compare with")


def _check_tensor(what: str, array: Array, spec: TensorSpec) -> None:
    try:
        dtype = tensors.dtype_of(array).name
    except tensors.TensorError:
        dtype = array.dtype.name
    if dtype != spec.dtype:
        raise InvalidModelError(f"golden {what} is {dtype}, the signature says {spec.dtype}")
    if spec.shape is not None and not _fits(array.shape, spec.shape):
        wanted = ", ".join("any" if size is None else str(size) for size in spec.shape)
        raise InvalidModelError(f"golden {what} has the shape {[*array.shape]}, the signature says [{wanted}]")
    if what.startswith("output") and array.dtype.kind == "f" and bool(np.isnan(array).any()):
        raise InvalidModelError(f"golden {what} holds NaN, which no answer can be compared with")


def _fits(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return len(shape) == len(wanted) and all(w in (None, s) for s, w in zip(shape, wanted, strict=True))


def _check_rows(signature: str, rows: list[tuple[str, int]]) -> None:
    first, count = rows[0]
    if count == 0:
        raise InvalidModelError(f"golden examples for {shown(signature)} have no rows")
    for what, other in rows:
        if other != count:
            raise InvalidModelError(f"golden {what} has {other} rows, {first} has {count}")


def _stored(value: Array) -> Array:
    dtype = tensors.dtype_of(value)
    tensors.element_count(value.shape)
    data = tensors.array_bytes(value, dtype)
    return np.frombuffer(data, dtype.storage or _BYTE)


def _zip(named: Sequence[tuple[str, Array]]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in named:
            info = zipfile.ZipInfo(f"{name}.npy", _EPOCH)
            info.external_attr = 0o644 << 16
            with archive.open(info, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _read(archive: zipfile.ZipFile) -> list[Golden]:
    # Nothing is compressed, so nothing can be larger than the file itself.
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        raise IntegrityError(f"{_DAMAGED}: it is compressed")
    index = parse(bytes(_array(archive, _INDEX, _BYTE)), "golden.npz")
    if index.integer("format", at_least=1) > _FORMAT:
        raise IntegrityError("golden.npz has a newer format: upgrade modelport")

    def tensor(fields: Fields, name: str) -> Array:
        entry = fields.child(name)
        dtype = tensors.DTYPES.get(entry.text("dtype"))
        shape = entry.items("shape")
        sizes = [size for size in shape if type(size) is int]
        if dtype is None or len(sizes) != len(shape):
            raise entry.wrong("dtype" if dtype is None else "shape")
        stored = _array(archive, entry.text("array"), dtype.storage or _BYTE)
        return tensors.array_from_bytes(dtype, sizes, stored)

    return [
        Golden(
            signature=item.text("signature"),
            inputs=item.mapping("inputs", tensor),
            outputs=item.mapping("outputs", tensor),
            rtol=item.number("rtol"),
            atol=item.number("atol"),
        )
        for item in index.objects("golden")
    ]


def _array(archive: zipfile.ZipFile, name: str, dtype: np.dtype[Any]) -> memoryview:
    """Returns the bytes of one flat array; nothing is allocated that its header claims."""
    data = archive.read(f"{name}.npy")
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise IntegrityError(_DAMAGED)
    shape, _, found = np.lib.format.read_array_header_1_0(file)
    start = file.tell()
    if found != dtype or len(shape) != 1 or shape[0] * dtype.itemsize != len(data) - start:
        raise IntegrityError(f"{_DAMAGED}: the array {shown(name)} is not what the index says")
    return memoryview(data)[start:]
