"""Faults of the Redis that a worker uses. Redis only saves time, so no request may notice."""

from __future__ import annotations

import asyncio
import signal

from bench.fault_scene import RedisProcess, Row, Scene, answers, metric
from demo.service_process import ServiceProcess

FAILURES = "t2w_redis_failures_total"


async def redis_killed(scene: Scene) -> Row:
    """Redis is killed under load and stays away."""
    row, server, worker = _worker_with_redis(scene)
    async with scene.load(worker.url, row):
        server.kill()
        await scene.rest()
    return _judged(scene, row, worker)


async def redis_paused(scene: Scene) -> Row:
    """Redis stops answering but keeps its connections open, then goes on."""
    row, server, worker = _worker_with_redis(scene)
    async with scene.load(worker.url, row):
        server.send_signal(signal.SIGSTOP)
        await scene.rest()
        server.send_signal(signal.SIGCONT)
    return _judged(scene, row, worker)


async def redis_restarted(scene: Scene) -> Row:
    """Redis is killed, and an empty one comes up at the same address."""
    row, server, worker = _worker_with_redis(scene)
    async with scene.load(worker.url, row):
        server.kill()
        await scene.rest()
        await asyncio.to_thread(server.start)
        await scene.rest()
    with server.connected() as client:
        row.facts["keys in the new Redis"] = client.dbsize()
    row.expect(bool(row.facts["keys in the new Redis"]), "the restarted Redis is not used")
    return _judged(scene, row, worker)


async def redis_full(scene: Scene) -> Row:
    """Redis has no memory left and, without an eviction policy, refuses every write."""
    row, server, worker = _worker_with_redis(scene, "--maxmemory-policy", "noeviction")
    with server.connected() as client:
        async with scene.load(worker.url, row):
            client.flushdb()  # so that the worker has something to write
            client.config_set("maxmemory", 1)
            await scene.rest()
        refused = client.info("errorstats").get("errorstat_OOM", {})
    row.facts["writes refused"] = refused.get("count", 0)
    return _judged(scene, row, worker)


def _worker_with_redis(scene: Scene, *options: str) -> tuple[Row, RedisProcess, ServiceProcess]:
    """A worker that has to ask Redis each time, since it keeps no embeddings itself."""
    server = scene.redis(*options)
    worker = scene.worker(T2W_REDIS_URL=server.url, T2W_EMBEDDING_CACHE_SIZE="1")
    row = Row()
    row.facts["Redis failures before"] = metric(worker.url, FAILURES)
    return row, server, worker


def _judged(scene: Scene, row: Row, worker: ServiceProcess) -> Row:
    failures = metric(worker.url, FAILURES)
    row.facts["Redis failures seen"] = (failures or 0) - (row.facts.pop("Redis failures before") or 0)
    row.expect(row.facts["Redis failures seen"] > 0, "the worker did not notice the fault, so nothing was tested")
    row.expect(row.tally.answered == row.tally.sent, "a request failed for want of Redis")
    row.alive = answers(worker.url, scene.names)
    return row
