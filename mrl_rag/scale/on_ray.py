"""Makes shards on a Ray cluster, by actors of Ray Data."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from mrl_rag import errors
from mrl_rag.arguments import check_integer
from mrl_rag.extras import require
from mrl_rag.index.shards import Shard
from mrl_rag.scale.encoding import Done, Job, ShardEncoder
from mrl_rag.scale.inputs import Part


def make_on_ray(worker: ShardEncoder, jobs: Sequence[Job], workers: int | None, cpus_per_worker: int) -> Iterator[Done]:
    """Yield the shards as they are made.

    Args:
        worker: makes one; each actor has a copy.
        jobs: what to make. A row of the dataset is a job, so that a shard is never split between actors.
        workers: how many actors there are; None for one per GPU, or as many as there are cores for.
        cpus_per_worker: cores of an actor without a GPU.

    Raises:
        MissingExtra: Ray is not installed.
        MrlRagError: what a worker raised.
        WorkerError: Ray can't be reached, failed, or finished nothing for too long.
    """
    ray, data = require("ray", "ray"), require("ray.data", "ray")
    with _connected(ray):
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        cpus = check_integer("cpus_per_worker", cpus_per_worker, 1)
        most = gpus or max(int(resources.get("CPU", 1)) // cpus, 1)
        size = most if workers is None else check_integer("workers", workers, 1)
        rows = data.from_items([{"job": json.dumps(asdict(job))} for job in jobs], override_num_blocks=len(jobs))
        rows.context.enable_progress_bars = rows.context.print_on_execution_start = False
        made = rows.map_batches(
            _Worker,
            fn_constructor_args=(worker,),
            batch_size=1,
            compute=data.ActorPoolStrategy(size=min(size, len(jobs))),
            **({"num_gpus": 1} if gpus else {"num_cpus": cpus}),
        )
        for row in made.iter_rows():
            answer = json.loads(row["answer"])
            if "error" in answer:
                raise getattr(errors, answer["error"])(answer["said"])
            yield Done(**{**answer, "shard": Shard(**answer["shard"])})


class _Worker:
    """What an actor does with a row."""

    def __init__(self, shards: ShardEncoder) -> None:
        self._shards = shards

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, list[str]]:
        job = json.loads(str(rows["job"][0]))
        parts = [Part(**{**part, "ids": tuple(part["ids"])}) for part in job["parts"]]
        try:
            answer = asdict(self._shards.make(Job(job["number"], parts)))
        except errors.MrlRagError as error:
            # Ray keeps only the text of an error that it passes on.
            answer = {"error": type(error).__name__, "said": str(error)}
        return {"answer": [json.dumps(answer)]}


@contextmanager
def _connected(ray: Any) -> Iterator[None]:
    """Use the Ray that this process has, or connect to a cluster, or start one on this machine and end it again."""
    timeout = require("ray.data.exceptions", "ray").ExecutionTimeoutError
    logger = logging.getLogger("ray.data")
    level, started = logger.level, not ray.is_initialized()
    try:
        if started:
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
        logger.setLevel(logging.ERROR)
        yield
    except (ray.exceptions.RayError, timeout, ConnectionError) as error:
        raise errors.WorkerError(
            f"Ray failed: {error}. The shards that were written are kept; call it again."
        ) from error
    finally:
        logger.setLevel(level)
        if started:
            ray.shutdown()
