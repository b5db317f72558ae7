"""What a gRPC channel is made with: target, options, credentials."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import socket
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio

from modelport._options import ClientOptions, RetryPolicy, require
from modelport.exceptions import InputError

_RETRIED_METHODS = (
    {"service": "modelport.v1.PredictionService", "method": "Predict"},
    {"service": "modelport.v1.ModelService", "method": "GetModel"},
    {"service": "modelport.v1.ModelService", "method": "ListModels"},
    {"service": "modelport.v1.RolloutService", "method": "GetRollout"},
    {"service": "modelport.v1.RolloutService", "method": "GetPolicy"},
    {"service": "modelport.v1.RolloutService", "method": "ReadJournal"},
)


async def channel_target(addresses: Sequence[str]) -> str:
    """Returns gRPC's name for ``addresses``: a single one as it is, several with their hosts looked up.

    Raises:
        InputError: if a host is not known.
    """
    if len(addresses) == 1:
        return addresses[0]
    found = await asyncio.gather(*[_resolved(*split_address(address)) for address in addresses])
    return _joined([numeric for group in found for numeric in group])


def open_channel(target: str, addresses: Sequence[str], options: ClientOptions) -> grpc.aio.Channel:
    """Returns a channel to ``addresses``; must be called in the event loop that will use it.

    Args:
        target: what ``channel_target`` says of the addresses.
        addresses: the addresses as they were given.
        options: how the client behaves.
    """
    arguments = channel_arguments(options, several=len(addresses) > 1)
    if options.tls is None:
        return grpc.aio.insecure_channel(target, options=arguments)
    tls = options.tls
    name = tls.server_name or ("" if len(addresses) == 1 else split_address(addresses[0])[0])
    if name:
        arguments += [("grpc.ssl_target_name_override", name), ("grpc.default_authority", name)]
    credentials = grpc.ssl_channel_credentials(tls.root_certificates, tls.private_key, tls.certificate_chain)
    return grpc.aio.secure_channel(target, credentials, options=arguments)


def channel_arguments(options: ClientOptions, *, several: bool) -> list[tuple[str, str | int]]:
    """Returns gRPC's channel arguments."""
    return [
        ("grpc.max_receive_message_length", options.max_message_bytes),
        ("grpc.max_send_message_length", options.max_message_bytes),
        ("grpc.per_rpc_retry_buffer_size", options.max_message_bytes),  # 256 KiB otherwise
        ("grpc.service_config", json.dumps(service_config(options.retry, several=several))),
        ("grpc.enable_retries", 1),
        ("grpc.keepalive_time_ms", round(options.keepalive.time_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(options.keepalive.timeout_s * 1000)),
        # A ping that nobody answers runs into this one, 60 s by default, whatever the keepalive's says.
        ("grpc.http2.ping_timeout_ms", round(options.keepalive.timeout_s * 1000)),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 50),
        # The time that one attempt to connect has, and not a least wait between two.
        ("grpc.min_reconnect_backoff_ms", 5000),
        ("grpc.max_reconnect_backoff_ms", 500),
        ("grpc.use_local_subchannel_pool", 1),
    ]


def service_config(retry: RetryPolicy, *, several: bool) -> dict[str, object]:
    """Returns gRPC's service configuration: balancing, health checks and retries."""
    config: dict[str, object] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if several:  # a single server's status must be seen even while it is not ready for calls
        config["healthCheckConfig"] = {"serviceName": ""}
    if retry.max_attempts > 1:
        policy = {
            "maxAttempts": retry.max_attempts,
            "initialBackoff": f"{retry.initial_backoff_s:.3f}s",
            "maxBackoff": f"{retry.max_backoff_s:.3f}s",
            "backoffMultiplier": 2,
            "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
        }
        # Not for streams: those are resumed here, and gRPC would keep all they sent.
        config["methodConfig"] = [{"name": list(_RETRIED_METHODS), "retryPolicy": policy}]
        config["retryThrottling"] = {"maxTokens": retry.budget, "tokenRatio": retry.budget_ratio}
    return config


def checked_addresses(addresses: str | Sequence[str]) -> tuple[str, ...]:
    """Returns the addresses as a tuple, each ``host:port`` or ``unix:path``.

    Raises:
        InputError: if there is none, or one of them is no address.
    """
    given: tuple[Any, ...] = (addresses,)  # not everybody has a type checker
    if not isinstance(addresses, str):
        with contextlib.suppress(TypeError):
            given = tuple(addresses)
    require(bool(given), "give at least one address, for example 127.0.0.1:8500")
    for address in given:
        require(isinstance(address, str), f"{address!r} is not an address; write host:port or unix:path")
        if not address.startswith("unix:"):
            split_address(address)
        elif len(given) > 1:
            raise InputError(f"{address!r}: a unix socket can only be the one address, not one of several")
    return given


def split_address(address: str) -> tuple[str, int]:
    """Returns the host and the port of ``host:port``.

    Raises:
        InputError: if it is not of that form.
    """
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and "/" not in host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise InputError(f"{address!r} is not an address; write host:port or unix:path")
    return host, int(port)


_Address = tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]


def _joined(numeric: Sequence[_Address]) -> str:
    family = "ipv6" if any(ip.version == 6 for ip, _ in numeric) else "ipv4"
    if family == "ipv6":
        parts = [f"[{ip if ip.version == 6 else f'::ffff:{ip}'}]:{port}" for ip, port in numeric]
    else:
        parts = [f"{ip}:{port}" for ip, port in numeric]
    return f"{family}:{','.join(dict.fromkeys(parts))}"


async def _resolved(host: str, port: int) -> list[_Address]:
    try:
        return [(ipaddress.ip_address(host), port)]
    except ValueError:
        pass
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise InputError(f"no address is known for the host {host!r}: {error.strerror}") from error
    numeric = [(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]), port) for entry in found]
    # One family per channel: a name such as localhost, which has both, is one server and not two.
    return [n for n in numeric if n[0].version == 4] or numeric
