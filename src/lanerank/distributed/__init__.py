"""Rank whole data sets, on one machine or on a Ray cluster. Needs the extra `lanerank[ray]`."""

from importlib.util import find_spec

from lanerank.errors import MissingExtraError

try:
    from lanerank.distributed.dataset import BulkReport, rank_dataset
except ModuleNotFoundError as error:
    missing = [name for name in ("pyarrow", "filelock") if find_spec(name) is None]
    if not missing:
        raise
    raise MissingExtraError(
        f"`lanerank.distributed` needs {' and '.join(missing)}, not installed here. "
        'Install the extra: pip install "lanerank[ray]"'
    ) from error

__all__ = ["BulkReport", "rank_dataset"]
