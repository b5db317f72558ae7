"""Checks a version byte by byte against its manifest."""

from __future__ import annotations

from modelport.names import shown
from modelport_registry._errors import IntegrityError, NotFoundError
from modelport_registry._files import Found, read_bounded, sha256_of, walk
from modelport_registry._folder import ModelFolder
from modelport_registry._manifest import MANIFEST, MAX_MANIFEST_BYTES, SAVED_MODEL, FileEntry, Manifest


def read_manifest(folder: ModelFolder, version: int) -> Manifest:
    """Returns the manifest of a version, which must be of that model and number.

    Raises:
        NotFoundError: if there is no such version.
        IntegrityError: if the manifest is damaged or belongs elsewhere.
    """
    try:
        data = read_bounded(folder.version(version) / MANIFEST, MAX_MANIFEST_BYTES, IntegrityError)
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise NotFoundError(f"{folder.model} has no version {version}") from exc
    manifest = Manifest.from_json(data)
    if (manifest.model, manifest.version) != (folder.model, version):
        raise IntegrityError(
            f"the manifest is that of {manifest.model} version {manifest.version}: it was copied by hand"
        )
    return manifest


def verify(folder: ModelFolder, version: int) -> Manifest:
    """Returns the manifest, after reading every byte of the version; special files are never opened.

    Raises:
        NotFoundError: if there is no such version.
        IntegrityError: at the first file that is not what was published.
    """
    if not folder.has(version):
        raise NotFoundError(f"{folder.model} has no version {version}")
    manifest = read_manifest(folder, version)
    expected = {entry.path: entry for entry in manifest.files}
    if SAVED_MODEL not in expected:
        raise IntegrityError(f"the manifest does not list {SAVED_MODEL}")
    found = list(walk(folder.version(version), IntegrityError))
    _check_names(found, expected)
    for item in found:
        if item.path in expected:
            _check_file(folder, version, expected[item.path])
    return manifest


def _check_names(found: list[Found], expected: dict[str, FileEntry]) -> None:
    folders = {"/".join(path.split("/")[:depth]) for path in expected for depth in range(1, path.count("/") + 1)}
    files = {item.path: item for item in found if not item.is_folder}
    for item in found:
        if item.path not in (folders if item.is_folder else {MANIFEST, *expected}):
            raise IntegrityError(f"{shown(item.path)} was not published")
        if not item.is_folder and item.links != 1:
            raise IntegrityError(f"{shown(item.path)} is hard-linked: it could be changed from elsewhere")
    for path, entry in expected.items():
        if path not in files:
            raise IntegrityError(f"{shown(path)} is missing")
        if files[path].size != entry.size:
            raise IntegrityError(f"{shown(path)} has {files[path].size} bytes, {entry.size} were published")


def _check_file(folder: ModelFolder, version: int, entry: FileEntry) -> None:
    size, digest = sha256_of(folder.version(version) / entry.path, IntegrityError)
    if (size, digest) != (entry.size, entry.sha256):
        raise IntegrityError(f"{shown(entry.path)} is damaged: its SHA-256 is not the published one")
