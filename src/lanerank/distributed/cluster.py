"""Sharing the shards of a run out: to the actors of a Ray Data pool, or in this process."""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from itertools import starmap
from typing import Any

from pydantic import TypeAdapter

from lanerank import errors
from lanerank.distributed.rows import Shard
from lanerank.distributed.store import ShardRecord
from lanerank.distributed.worker import Failure, Job, ShardRanker
from lanerank.errors import BulkError, InputError, LanerankError, MissingExtraError

Concurrency = int | tuple[int, int] | None
"""How many workers: a number, the least and the most, or whatever there is room for."""

_ENVIRONMENT = {
    # Nothing tells a third party what runs here.
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray would put the workers behind everything else; whoever wants that has `nice`.
    "RAY_worker_niceness": "0",
}
"""Of a Ray that is started here, unless the user says otherwise."""
_KEPT = "what is done is kept, and the same call goes on from there"
_OUTCOME: TypeAdapter[ShardRecord | Failure] = TypeAdapter(ShardRecord | Failure)


def rank_shards(
    job: Job,
    shards: Mapping[int, Shard],
    *,
    concurrency: Concurrency,
    num_cpus: float,
    num_gpus: float,
) -> Generator[ShardRecord]:
    """Rank shards, in any order, and give the record of each when it is done.

    Raises:
        InputError: `concurrency` is not usable.
        MissingExtraError: Ray is needed and not installed.
        BulkError: Workers failed for reasons of their own.
        LanerankError: What ranking raised, in whatever process.
    """
    _check(concurrency)
    if not shards:
        return
    outcomes = (
        _in_process(job, shards)
        if concurrency == 0
        else _on_ray(job, shards, concurrency, num_cpus, num_gpus)
    )
    # Closed at once where the run ends early, and with it all that it holds of Ray.
    with closing(outcomes):
        for outcome in outcomes:
            if isinstance(outcome, Failure):
                raise _error(outcome)
            yield outcome


def _in_process(job: Job, shards: Mapping[int, Shard]) -> Generator[ShardRecord | Failure]:
    with closing(ShardRanker(job)) as rank:
        yield from starmap(rank, shards.items())


class _Actor:
    """What Ray Data keeps in each worker: batches of one shard in, one outcome out."""

    def __init__(self, job: Job) -> None:
        self._rank = ShardRanker(job)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        shards = zip(batch["number"], batch["shard"], strict=True)
        outcomes = [self._outcome(int(number), str(shard)) for number, shard in shards]
        return {"outcome": [outcome.model_dump_json() for outcome in outcomes]}

    def _outcome(self, number: int, shard: str) -> ShardRecord | Failure:
        try:
            return self._rank(number, Shard.model_validate_json(shard))
        except Exception as error:  # noqa: BLE001 - raised again by the driver
            return Failure(
                error=BulkError.__name__,
                message=f"a worker failed with {type(error).__name__}: {error}; {_KEPT}",
                traceback=traceback.format_exc(),
            )


def _on_ray(
    job: Job,
    shards: Mapping[int, Shard],
    concurrency: Concurrency,
    num_cpus: float,
    num_gpus: float,
) -> Generator[ShardRecord | Failure]:
    with _cluster(num_cpus, num_gpus) as ray:
        if concurrency is None:
            concurrency = min(len(shards), _room(ray.cluster_resources(), num_cpus, num_gpus))
        least, most = (concurrency,) * 2 if isinstance(concurrency, int) else concurrency
        items = [{"number": n, "shard": s.model_dump_json()} for n, s in shards.items()]
        # A block for each shard, or one worker would get many at once. Ray starts a worker that
        # died again and retries its shard, without end; it is `ShardRanker` that counts.
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            _Actor,
            fn_constructor_args=(job,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most),
            num_cpus=num_cpus,
            num_gpus=num_gpus or None,
        )
        dataset.context.enable_progress_bars = False
        dataset.context.print_on_execution_start = False
        # A shard takes what it takes; half an hour is the default.
        dataset.context.execution_no_progress_timeout_s = -1
        try:
            with closing(
                iter(dataset.iter_batches(batch_size=None, prefetch_batches=0))
            ) as batches:
                for batch in batches:
                    for outcome in batch["outcome"]:
                        yield _OUTCOME.validate_json(str(outcome))
        except ray.exceptions.RayError as error:
            last = str(error).strip().splitlines()[-1:]
            raise BulkError(
                f"Ray failed with {type(error).__name__}: {''.join(last)}; {_KEPT}"
            ) from error


@contextmanager
def _cluster(num_cpus: float, num_gpus: float) -> Iterator[Any]:
    """Ray, connected: to the cluster that the process or `RAY_ADDRESS` names, or to a new one.

    Raises:
        InputError: A new one, of this machine alone, has no room for a worker.
        MissingExtraError: Ray is not installed.
    """
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            'ranking on workers needs Ray; install the extra: pip install "lanerank[ray]", or '
            "rank in this process with `concurrency=0`"
        ) from error
    if ray.is_initialized():
        yield ray
        return
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # What Ray tells of its own work would come between the lines of a progress bar.
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        if "RAY_ADDRESS" not in os.environ:
            # No node will ever join, and Ray would wait for one.
            _check_room(ray.cluster_resources(), num_cpus, num_gpus)  # type: ignore[no-untyped-call]  # Ray does not annotate it
        yield ray
    finally:
        ray.shutdown()


def _check_room(resources: Mapping[str, float], num_cpus: float, num_gpus: float) -> None:
    for name, option, wanted in (("CPU", "num_cpus", num_cpus), ("GPU", "num_gpus", num_gpus)):
        if wanted > (there := resources.get(name, 0)):
            raise InputError(
                f"`{option}` is {wanted:g} for each worker, and Ray finds {there:g} on this "
                "machine; ask for less, or name a cluster in RAY_ADDRESS"
            )


def _room(resources: Mapping[str, float], num_cpus: float, num_gpus: float) -> int:
    """How many workers the cluster can hold, at least one."""
    wanted = {"CPU": num_cpus, "GPU": num_gpus}
    room = [int(resources.get(name, 0) / each) for name, each in wanted.items() if each]
    return max(1, min(room, default=1))


def _check(concurrency: Concurrency) -> None:
    if concurrency is None:
        return
    numbers = concurrency if isinstance(concurrency, tuple) else (concurrency, concurrency)
    whole = all(isinstance(each, int) and not isinstance(each, bool) for each in numbers)
    least = int(isinstance(concurrency, tuple))
    if not whole or len(numbers) != 2 or not least <= numbers[0] <= numbers[1]:
        raise InputError(
            "`concurrency` must be a number of workers, 0 for none beside this process, or the "
            f"least and the most of a pool, got {concurrency!r}"
        )


def _error(failure: Failure) -> LanerankError:
    kind = getattr(errors, failure.error)
    # The only one whose message is made of parts.
    kind = LanerankError if kind is errors.FileFormatError else kind
    error: LanerankError = kind(failure.message)
    if failure.traceback:
        error.add_note(failure.traceback)
    return error
