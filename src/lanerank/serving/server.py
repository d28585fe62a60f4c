"""Starting and stopping a server: with a Ray of its own on one machine, or on a Ray cluster."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from lanerank.errors import InputError, ModelLoadError
from lanerank.serving.settings import ServerSettings

if TYPE_CHECKING:
    from ray.serve.deployment import Application

_APPLICATION = "lanerank"
# What is on its way to the model lies in shared memory; what does not fit goes to the disk.
_LOCAL: dict[str, Any] = {"include_dashboard": False, "object_store_memory": 500_000_000}
_PATIENCE_S = 30.0
"""How long a server that has been deployed may take to answer."""
ENVIRONMENT = {
    # Ray's own ports are then open to this machine alone, on any system and not just on those that
    # the name says; but for one of each process of Serve, which asks for Ray's token.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray would put the model behind everything else that runs on the machine.
    "RAY_worker_niceness": "0",
    # Ray kills an HTTP process that needs longer to start, as it may on a busy machine.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}


@contextmanager
def running(settings: ServerSettings, *, address: str | None = None) -> Iterator[str]:
    """Run a server as long as the block lasts.

    Args:
        settings: Of the server. Where Ray is started for it, what they leave open about processor
            cores and GPUs is what the machine has.
        address: Of a Ray cluster; `"auto"` is the one that this machine belongs to. By default that
            of the environment variable `RAY_ADDRESS`, or a Ray that is started for the server, for
            this machine alone, and ends with it.

    Yields:
        The address of the server, once it answers.

    Raises:
        InputError: The token's variable is not set, or the port is not to be had.
        ModelLoadError: The model cannot be loaded.
    """
    settings.token()
    own = address is None and not os.environ.get("RAY_ADDRESS")
    if own:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    # Here, because Ray reads the environment when it is imported.
    import ray
    from ray import serve

    from lanerank.serving.deployment import application

    # It says what the caller is told anyway.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with ExitStack() as ending:
        if not ray.is_initialized():
            if own:
                _check_port(settings)
            ending.callback(ray.shutdown)
            with _own_handlers():
                ray.init(
                    address="local" if own else address,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    **(_LOCAL if own else {}),
                )
            if own:
                resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]  # not annotated
                settings = fitted(settings, resources)
        serve.start(http_options={"host": settings.host, "port": settings.port})
        # Lets the requests end that are being answered.
        ending.callback(serve.delete, _APPLICATION)
        try:
            serve.run(application(settings), name=_APPLICATION, route_prefix="/")
        except RuntimeError as error:
            raise ModelLoadError(_reason(str(error))) from None
        url = f"http://{_reachable(settings.host)}:{settings.port}"
        _wait_for(url)
        yield url


def build(args: Mapping[str, object]) -> Application:
    """The server for Ray's own tools.

    As in `serve run lanerank.serving:build model=FOLDER batching.max_size=16`, or as `import_path`
    with `args` in a configuration for `serve deploy`.

    Args:
        args: Settings by name, inner ones as a mapping or by a dotted name; `config` is a YAML file
            to begin with. Host and port are not among them, since Serve has its own for these.

    Raises:
        InputError: A setting is unknown or not usable.
    """
    values = dict(args)
    if foreign := sorted(values.keys() & {"host", "port"}):
        raise InputError(
            f"`{foreign[0]}` is for Serve to set, as `http_options` in its configuration or with "
            "`serve start`; or use `lanerank serve`"
        )
    config = values.pop("config", None)
    settings = ServerSettings.read(None if config is None else str(config), values)
    # Here, because Ray must not be imported before `running` has set it up.
    from lanerank.serving.deployment import application

    return application(settings)


def fitted(settings: ServerSettings, resources: Mapping[str, float]) -> ServerSettings:
    """The settings, with what they leave open taken from what a machine has.

    Args:
        settings: Of the server.
        resources: As Ray counts them: `"CPU"` and `"GPU"`.
    """
    copies = settings.replicas.max
    found: dict[str, float] = {}
    if settings.num_cpus is None:
        found["num_cpus"] = max(1.0, resources.get("CPU", 1.0) // copies)
    gpus = resources.get("GPU", 0.0)
    if settings.num_gpus is None and gpus and settings.device == "auto":
        found["num_gpus"] = min(1.0, gpus / copies)
    return settings.model_copy(update=found)


@contextmanager
def _own_handlers() -> Iterator[None]:
    """Keep the caller's handlers of signals, where Ray puts others in their place."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        # Nobody else may set them.
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _check_port(settings: ServerSettings) -> None:
    where = (settings.host, settings.port)
    try:
        family = socket.getaddrinfo(*where, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except OSError as error:
        raise InputError(
            f"cannot listen on port {settings.port} of {settings.host!r} ({error.strerror}); "
            "choose another `port` or `host`"
        ) from error


def _reachable(host: str) -> str:
    """A name under which this machine reaches what listens on `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def _wait_for(url: str) -> None:
    end = time.monotonic() + _PATIENCE_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                if "model" in json.load(answer):
                    return
        except (OSError, ValueError):
            pass
        if time.monotonic() > end:
            raise InputError(
                f"the server is deployed, and does not answer at {url}; if Serve ran on this "
                "cluster before, it listens where it was told then: set `host` and `port` so, or "
                "stop it with `serve shutdown`"
            )
        time.sleep(0.2)


def _reason(message: str) -> str:
    """What stopped a deployment, out of the report of it."""
    from ray import serve

    status = serve.status().applications.get(_APPLICATION)
    reports = [message]
    if status is not None:
        reports = [each.message for each in status.deployments.values()] + [status.message, message]
    named: list[str] = re.findall(r"lanerank\.errors\.\w+: (.*)", "\n".join(reports))
    if named:
        return named[0]
    return f"the server could not be deployed: {next(filter(None, reports))}"
