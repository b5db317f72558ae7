"""Encrypted connections: whom the client trusts, and for what name."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import grpc
import numpy as np
import pytest

from modelport import AsyncClient, RetryPolicy, Tls, UnavailableError
from tests.support.fake_server import FakeServer

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificates with openssl")

ONCE = RetryPolicy(max_attempts=1)
X = {"x": np.ones(1, np.float32)}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """A self-signed certificate for models.test and its key, as PEM."""
    folder = tmp_path_factory.mktemp("tls")
    names = ["-subj", "/CN=models.test", "-addext", "subjectAltName=DNS:models.test"]
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    files = ["-keyout", str(folder / "key"), "-out", str(folder / "crt")]
    subprocess.run(["openssl", "req", *kind, *names, *files], check=True, capture_output=True)
    return Path(folder / "crt").read_bytes(), Path(folder / "key").read_bytes()


def secure(certificate: tuple[bytes, bytes], *, ask: bool = False) -> FakeServer:
    chain, key = certificate
    trusted = chain if ask else None
    return FakeServer(credentials=grpc.ssl_server_credentials([(key, chain)], trusted, ask))


async def test_a_trusted_server_with_the_right_name(certificate: tuple[bytes, bytes]) -> None:
    tls = Tls(root_certificates=certificate[0], server_name="models.test")
    async with secure(certificate) as server:
        for addresses in (server.address, [server.address, "127.0.0.1:1"]):
            async with AsyncClient(addresses, tls=tls) as client:
                assert (await client.predict("m", X)).version == 1


@pytest.mark.parametrize("server_name", ["", "other.test"])
async def test_another_name_is_refused(certificate: tuple[bytes, bytes], server_name: str) -> None:
    tls = Tls(root_certificates=certificate[0], server_name=server_name)
    async with secure(certificate) as server, AsyncClient(server.address, tls=tls, retry=ONCE) as client:
        with pytest.raises(UnavailableError, match="no server answers at"):
            await client.predict("m", X)
    assert server.requests == []


async def test_an_unknown_authority_is_refused(certificate: tuple[bytes, bytes]) -> None:
    tls = Tls(server_name="models.test")
    async with secure(certificate) as server, AsyncClient(server.address, tls=tls, retry=ONCE) as client:
        with pytest.raises(UnavailableError, match="no server answers at"):
            await client.predict("m", X)


async def test_a_client_s_own_certificate(certificate: tuple[bytes, bytes]) -> None:
    chain, key = certificate
    tls = Tls(root_certificates=chain, private_key=key, certificate_chain=chain, server_name="models.test")
    bare = Tls(root_certificates=chain, server_name="models.test")
    async with secure(certificate, ask=True) as server:
        async with AsyncClient(server.address, tls=tls) as client:
            assert (await client.predict("m", X)).version == 1
        async with AsyncClient(server.address, tls=bare, retry=ONCE) as client:
            with pytest.raises(UnavailableError):
                await client.predict("m", X)
