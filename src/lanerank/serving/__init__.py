"""A server for rerankers, on Ray Serve. Needs the extra `lanerank[serve]`."""

from importlib.util import find_spec

from lanerank.errors import MissingExtraError

if _missing := [name for name in ("fastapi", "prometheus_client", "ray") if not find_spec(name)]:
    raise MissingExtraError(
        f"`lanerank.serving` needs {' and '.join(_missing)}, not installed here. "
        'Install the extra: pip install "lanerank[serve]"'
    )

from lanerank.serving.app import create_app
from lanerank.serving.server import build, running
from lanerank.serving.settings import Batching, Replicas, ServerSettings

__all__ = ["Batching", "Replicas", "ServerSettings", "build", "create_app", "running"]
