"""`lanerank serve`."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from lanerank.cli.console import ModelOption, err, out
from lanerank.contracts import LongDocuments
from lanerank.reranker import OnUnsupported

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    *,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="A YAML file of settings.")
    ] = None,
    model: ModelOption = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps, or auto.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    host: Annotated[str | None, typer.Option(help="127.0.0.1 unless set; 0.0.0.0 is all.")] = None,
    port: Annotated[int | None, typer.Option(help="8000 unless set.")] = None,
    token_env: Annotated[
        str | None,
        typer.Option(help="The environment variable with the token that clients must show."),
    ] = None,
    max_documents: Annotated[int | None, typer.Option(help="Documents in a request.")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Bytes of a request's body.")] = None,
    max_queued: Annotated[
        int | None, typer.Option(help="Waiting requests, before others are refused.")
    ] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds that a request may take.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Requests that the model is given at a time.")
    ] = None,
    batch_wait_ms: Annotated[
        float | None, typer.Option(help="How long an idle model waits for more requests.")
    ] = None,
    min_replicas: Annotated[int | None, typer.Option(help="Copies of the model, at least.")] = None,
    max_replicas: Annotated[int | None, typer.Option(help="Copies of the model, at most.")] = None,
    target_ongoing_requests: Annotated[
        float | None, typer.Option(help="Requests for each copy, above which another is added.")
    ] = None,
    num_cpus: Annotated[float | None, typer.Option(help="Processor cores for each copy.")] = None,
    num_gpus: Annotated[float | None, typer.Option(help="GPUs for each copy.")] = None,
    long_documents: Annotated[
        LongDocuments | None, typer.Option(help="Cut long documents, or score windows of them.")
    ] = None,
    on_unsupported: Annotated[
        OnUnsupported | None,
        typer.Option(help="What to do with an instruction if the model takes none."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            envvar="RAY_ADDRESS",
            help="A Ray cluster, `auto` for this machine's; otherwise Ray is started here.",
        ),
    ] = None,
) -> None:
    """Serve a model over HTTP until Ctrl-C.

    Needs the extra `lanerank[serve]`. Options replace what the file says; the file holds the same
    settings.
    """
    # Here, because ranking must work without the extra.
    from lanerank.serving import ServerSettings, running

    settings = ServerSettings.read(
        config,
        {
            "model": model,
            "device": device,
            "dtype": dtype,
            "host": host,
            "port": port,
            "token_env": token_env,
            "max_documents": max_documents,
            "max_bytes": max_bytes,
            "max_queued": max_queued,
            "timeout_s": timeout,
            "batching.max_size": batch_size,
            "batching.wait_ms": batch_wait_ms,
            "replicas.min": min_replicas,
            "replicas.max": max_replicas,
            "replicas.target_ongoing_requests": target_ongoing_requests,
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            "long_documents": long_documents,
            "on_unsupported": on_unsupported,
        },
    )
    err.print("Starting ...")
    try:
        # Whoever ends the process otherwise wants the same as Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with running(settings, address=address) as url:
            if settings.token_env is None and settings.host not in _LOOPBACK:
                err.print(
                    f"[yellow]Whoever reaches {escape(settings.host)} is served; `--token-env` "
                    "asks for a token.[/yellow]"
                )
            out.print(f"Serving at {url}; Ctrl-C stops it. Try:", highlight=False)
            # As it is, for a shell to read.
            typer.echo(_example(url, settings.token_env))
            threading.Event().wait()
    except KeyboardInterrupt:
        err.print("Stopped.")


def _example(url: str, token_env: str | None) -> str:
    body = {
        "query": "candidates with IMO experience",
        "instruction": "We are a marine logistics company hiring for shipping compliance.",
        "documents": ["IMO gold medallist, maths coach.", "Audited tankers under IMO rules."],
    }
    token = f'  -H "Authorization: Bearer ${token_env}" \\\n' if token_env else ""
    return (
        f"curl {url}/v1/rerank \\\n{token}"
        f"  -H 'Content-Type: application/json' \\\n  -d '{json.dumps(body)}'"
    )
