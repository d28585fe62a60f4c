"""A small Ray on the loopback address, shared by whatever needs one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest

from lanerank.serving.server import ENVIRONMENT

TOKEN = "s3cr3t-0f-the-server"

# Read when Ray is imported, by whichever test module comes first.
os.environ.update(ENVIRONMENT)
with warnings.catch_warnings():
    # It declares its settings in a way that pydantic has come to dislike.
    warnings.simplefilter("ignore")
    import ray.serve


@pytest.fixture(scope="session")
def token() -> str:
    """The token of servers whose `token_env` is `RANKER_TOKEN`."""
    return TOKEN


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """The address of a Ray cluster of this machine alone."""
    if not ray.is_initialized():
        with pytest.MonkeyPatch.context() as patch:
            # A busy machine is no reason to kill workers.
            patch.setenv("RAY_memory_monitor_refresh_ms", "0")
            # Processes of Ray get the environment that it was started in.
            patch.setenv("RANKER_TOKEN", TOKEN)
            ray.init(
                address="local",
                num_cpus=2,
                include_dashboard=False,
                object_store_memory=100 << 20,
                log_to_driver=False,
                logging_level="ERROR",
            )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
