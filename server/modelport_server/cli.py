"""``modelport serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modelport.names import DEFAULT_ADDRESS
from modelport_server import _cli_verify

_MIB = 1 << 20


def register(app: typer.Typer) -> None:
    """Adds the server's commands."""
    app.command("serve", rich_help_panel="Serve")(serve)
    _cli_verify.register(app)


def serve(
    registry: Annotated[
        Path, typer.Option("--registry", "-r", envvar="MODELPORT_REGISTRY", help="The registry's folder.")
    ] = Path("models"),
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="Serve this model; repeat for more. Default: all."),
    ] = None,
    address: Annotated[
        str,
        typer.Option(help="HOST:PORT, port 0 for any free one, or unix:PATH.", envvar="MODELPORT_ADDRESS"),
    ] = DEFAULT_ADDRESS,
    grace: Annotated[float, typer.Option(help="Seconds that accepted calls may take after SIGTERM.")] = 10.0,
    lame_duck: Annotated[float, typer.Option(help="Seconds in which new calls are still taken after SIGTERM.")] = 0.3,
    max_batch_size: Annotated[
        int | None,
        typer.Option(help="The most rows that run together.", show_default="what suits the model, at most 128"),
    ] = None,
    max_enqueued_rows: Annotated[int, typer.Option(help="The most rows that wait for a version.")] = 8192,
    max_message_mib: Annotated[int, typer.Option(help="The largest message, in MiB.")] = 64,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            help="tensorflow, openvino, or auto: the fastest that is installed and reproduces the golden examples. "
            "MODEL=ENGINE for one model; repeat for more.",
            show_default="auto",
        ),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            help="Compute in float32, bfloat16, float16 or int8, where the golden examples are reproduced. "
            "MODEL=PRECISION for one model; repeat for more.",
            show_default="float32",
        ),
    ] = None,
    instances: Annotated[
        list[str] | None,
        typer.Option(
            help="How many batches of a version run at once; 0 for what suits. MODEL=COUNT for one model; repeat for "
            "more.",
            show_default="what suits the machine and the model",
        ),
    ] = None,
    threads: Annotated[
        list[str] | None,
        typer.Option(
            help="Threads that one batch may use; 0 for what suits. MODEL=COUNT for one model; repeat for more.",
            show_default="what suits the machine and the model",
        ),
    ] = None,
    load_timeout: Annotated[float, typer.Option(help="Seconds that a version may take to load.")] = 300.0,
    run_timeout: Annotated[float, typer.Option(help="Seconds that a batch may run; then its engine hangs.")] = 60.0,
    poll_interval: Annotated[float, typer.Option(help="Seconds between two looks at the registry, at most 2.")] = 0.25,
    pinned_stream_limit: Annotated[
        float, typer.Option(help="Seconds that streams may stay on a version that has been replaced.")
    ] = 600.0,
    allow_control: Annotated[
        bool,
        typer.Option(
            "--allow-control",
            help="Let whoever reaches the port change rollouts, also where it is not this machine's alone.",
        ),
    ] = False,
    reuse_port: Annotated[bool, typer.Option(help="Let several servers share the port.")] = False,
    port_file: Annotated[Path | None, typer.Option(help="Write the port to this file once calls are taken.")] = None,
    metrics_address: Annotated[
        str,
        typer.Option(
            help="Answer Prometheus at http://HOST:PORT/metrics; port 0 for any free one.",
            envvar="MODELPORT_METRICS_ADDRESS",
            show_default="nowhere",
        ),
    ] = "",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
) -> None:
    """Serve the models of a registry over gRPC.

    A version takes traffic once it has reproduced its golden examples on this machine. Newer versions
    take over by themselves; SIGTERM answers what has been accepted and ends with status 0.

    Examples:

        modelport serve --registry models

        modelport serve -r models -m digits --address 0.0.0.0:8500

        modelport serve -r models --address unix:/run/modelport.sock

        modelport serve -r models --engine openvino --precision digits=bfloat16

        modelport serve -r models --metrics-address 127.0.0.1:8501
    """
    import logging

    from modelport_server import options
    from modelport_server.engines import ahead, kinds
    from modelport_server.errors import StartError

    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
    )
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    chosen = options.ServerOptions(
        registry=registry.absolute(),
        models=tuple(model or ()),
        address=address,
        metrics_address=metrics_address,
        allow_control=allow_control,
        grace_s=grace,
        lame_duck_s=lame_duck,
        batch=options.BatchLimits(
            max_batch_size=128 if max_batch_size is None else max_batch_size,
            adaptive=max_batch_size is None,
            max_enqueued_rows=max_enqueued_rows,
        ),
        engine=options.EngineLimits(load_timeout_s=load_timeout, run_timeout_s=run_timeout),
        engines=options.engine_rules(engine or [], precision or [], instances or [], threads or []),
        rollout=options.RolloutOptions(poll_interval_s=poll_interval, pinned_stream_limit_s=pinned_stream_limit),
        rpc=options.RpcOptions(max_message_bytes=max_message_mib * _MIB, reuse_port=reuse_port),
    )

    def on_listening(port: int) -> None:
        if port_file is not None:
            scratch = port_file.with_name(port_file.name + ".tmp")
            try:
                scratch.write_text(f"{port}\n")
                scratch.replace(port_file)
            except OSError as error:
                raise StartError(f"can't write the --port-file {port_file}: {error.strerror}") from error

    with ahead.begun(zygote=chosen.forks, primed=chosen.uses(kinds.OPENVINO)) as processes:
        from modelport_server import app  # the longest import of all: those processes have theirs meanwhile

        app.run(chosen, on_listening=on_listening, ahead=processes)
