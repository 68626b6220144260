"""The services under a run: Redis (embedded or by URL) and Ray (on this machine or a cluster),
started and stopped."""

from __future__ import annotations

import logging
import os
import signal
import socket
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from avatar_rl.buffer_service.config import BufferConfig
from avatar_rl.buffer_service.redis.server import EmbeddedRedis
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.resources import OVERSUBSCRIPTION, Needs, cluster_address, needs_of
from avatar_rl.cluster.services.allocator import jemalloc
from avatar_rl.cluster.services.judge_server import JudgeServer
from avatar_rl.cluster.services.log_mirror import LogMirror
from avatar_rl.cluster.services.orphans import OrphanReaper
from avatar_rl.cluster.services.placement import live_nodes
from avatar_rl.cluster.services.private_node import PrivateNode
from avatar_rl.cluster.services.shared_storage import check_shared
from avatar_rl.common.errors import ConfigError, ResourceError
from avatar_rl.rewards.config import RewardConfig

if TYPE_CHECKING:
    from ray._private.node import Node

log = logging.getLogger(__name__)

NODE_ATTEMPTS = 3

NODE_ANSWER_S = 120.0  # a node's first worker process takes seconds to start
#: Set for every worker process of a CPU run (docs/dependencies.md); never asked of the
#: user.
CPU_ENVIRONMENT = {
    "TORCH_COMPILE_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    # Threads that wait for each other sleep. By default they spin, which costs the others their
    # core: an update by two threads on two busy cores took 14 s of processor time in place of 4.
    "OMP_WAIT_POLICY": "PASSIVE",
    # without jemalloc: glibc has a heap per thread else, each as large as the largest step
    "MALLOC_ARENA_MAX": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "DS_ACCELERATOR": "cpu",
}
#: Of a run on one machine: collectives and engines listen on loopback (docs/security.md).
LOOPBACK = {
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "VLLM_HOST_IP": "127.0.0.1",
}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DEEPSPEED_LOG_LEVEL": "warning",
    "PYTHONWARNINGS": "ignore",
}


class Services:
    """Redis, Ray and a managed judge. Leaving the context stops what it started, and only that; it
    is safe to leave twice.

    Args:
        config: The recipe.
        data_dir: Where an embedded Redis, a judge's server and the logs of workers are written.
        needs: CPUs and GPUs of the actors; those of the recipe's training unless given.
    """

    def __init__(self, config: RunConfig, data_dir: Path, needs: Needs | None = None) -> None:
        self.config = config
        self.data_dir = data_dir
        self.needs = needs or needs_of(config)
        self.redis: EmbeddedRedis | None = None
        self.redis_url = ""
        self.on_gpu = False
        self.judge: JudgeServer | None = None
        self._ray_started = False
        self._mirror: LogMirror | None = None
        self._orphan_reaper: OrphanReaper | None = None
        self._private = PrivateNode()

    def __enter__(self) -> Services:
        try:
            self._start_redis(self.config.buffer)
            self._start_ray()
            self._start_judge()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def worker_environment(self) -> dict[str, str]:
        """Environment of rollout, learner and reward processes."""
        local = LOOPBACK if cluster_address(self.config) is None else {}
        return {**ENVIRONMENT, **local, **({} if self.on_gpu else CPU_ENVIRONMENT | jemalloc())}

    def engine_environment(self) -> dict[str, str]:
        """Environment of rollout processes. OpenMP reads its count for every thread from there, and
        vLLM refuses threads that count differently."""
        threads = (
            {} if self.on_gpu else {"OMP_NUM_THREADS": str(self.config.rollout.engine.threads)}
        )
        return self.worker_environment() | threads

    def rewards(self) -> RewardConfig:
        """The recipe's rewards; a judge that was started here is named by its address."""
        rewards, longest = self.config.rewards, self.config.rollout.sampling.max_tokens
        if rewards.overlong_tokens is None:
            rewards = rewards.model_copy(update={"overlong_tokens": longest})
        if self.judge is None:
            return rewards
        return rewards.model_copy(update={"judge": self.judge.client})

    def scorer_environment(self) -> dict[str, str]:
        """Environment of reward processes: the judge's key goes to them alone."""
        return self.worker_environment() | (
            self.judge.environment if self.judge is not None else {}
        )

    def _start_judge(self) -> None:
        rewards = self.config.rewards
        if rewards.judge.kind != "managed" or not rewards.asks_judge:
            return
        if cluster_address(self.config) is not None:
            raise ConfigError(
                "rewards.judge.kind managed serves on loopback, which other nodes of a cluster do "
                "not reach: serve the judge yourself and give rewards.judge.kind: openai with its "
                "base_url"
            )
        self.judge = JudgeServer(rewards.judge, self.data_dir / "judge.log", port=free_port())
        self.judge.start()

    def _start_redis(self, buffer: BufferConfig) -> None:
        if buffer.url is not None:
            self.redis_url = buffer.url
            return
        self.redis = EmbeddedRedis(self.data_dir / "redis", appendfsync=buffer.appendfsync).start()
        self.redis_url = self.redis.url

    def _start_ray(self) -> None:
        import ray

        resources = self.config.resources
        address = cluster_address(self.config)
        on_term = signal.getsignal(signal.SIGTERM)
        common: dict[str, Any] = {
            "logging_level": logging.ERROR,
            "log_to_driver": False,
            "namespace": "avatar",
        }
        if address:
            _join(address, **common)
        else:
            # Ray runs workers at nice 15, behind everything else on a laptop; here they are the
            # work.
            os.environ.setdefault("RAY_worker_niceness", "0")
            os.environ.setdefault(
                "RAY_prestart_worker_first_driver", "0"
            )  # every worker of ours has an environment
            self._private.start()
            # Logical CPUs: each process gets the share it asks for, also on a laptop with fewer
            # cores.
            _start_node(
                num_cpus=max(self.needs.cpus_rounded, OVERSUBSCRIPTION * (os.cpu_count() or 1)),
                include_dashboard=False,
                object_store_memory=resources.object_store_bytes,
                **common,
            )
            self._orphan_reaper = OrphanReaper()
        self._ray_started = True
        # in place of Ray's: the command's own, or to stop as orderly as on Ctrl-C
        signal.signal(signal.SIGTERM, on_term if callable(on_term) else signal.default_int_handler)
        node: Node | None = ray._private.worker._global_node
        assert node is not None  # of a driver that is connected
        logs = Path(node.get_session_dir_path()) / "logs"
        # by the names of their logs: worker id, job, pid; a cluster's node has had other jobs
        workers = f"*-{ray.get_runtime_context().get_job_id()}-*" if address else "*"
        self._mirror = LogMirror(logs, workers, self.data_dir / "logs").__enter__()
        have = ray.cluster_resources()
        self.on_gpu = have.get("GPU", 0) > 0
        if address:
            self._check_cluster()
        needs = self.needs.on_gpu() if self.on_gpu else self.needs
        short = [
            f"{wanted:g} {name} asked, {have.get(name, 0):g} there"
            for name, wanted in (("CPU", needs.cpus), ("GPU", needs.gpus))
            if wanted > have.get(name, 0)
        ]
        if needs.colocated and needs.gpus > have.get("GPU", 0):
            raise ResourceError(
                f"resources.colocate: {needs.rollouts} rollout actors and {needs.learners} learner "
                f"ranks need {needs.gpus:g} GPUs, {have.get('GPU', 0):g} there. Lower "
                "rollout.workers and learner.ranks to that"
            )
        if short:
            raise ResourceError(
                f"the {'cluster' if address else 'machine'} cannot hold this run: "
                f"{'; '.join(short)}. Lower rollout.workers, learner.ranks (cold_start.ranks) or "
                "the per-actor resources, set resources.colocate to share GPUs (docs/one-gpu.md), "
                "or add nodes"
            )

    def _check_cluster(self) -> None:
        """What several nodes need in common: a Redis that all reach, files that all see."""
        config, nodes = self.config, len(live_nodes())
        if nodes > 1 and config.resources.colocate:
            raise ResourceError(
                f"resources.colocate is for one node, and the cluster has {nodes}: set it to false "
                "(docs/cluster.md), or start Ray on one node"
            )
        if nodes > 1 and self.redis is not None:
            raise ResourceError(
                f"the cluster has {nodes} nodes, but the embedded Redis answers only on the "
                "driver's: start one that all reach (deploy/redis/redis.conf) and set buffer.url"
            )
        named = [config.model.path if config.model.path != "tiny" else None, config.model.reference]
        named += [config.data.train, config.data.heldout, config.data.sft]
        readable = [Path(path) for path in named if path is not None]
        check_shared([self.data_dir, config.output.cache], readable, deadline_s=NODE_ANSWER_S)

    def stop(self) -> None:
        if self.judge is not None:
            self.judge.stop()
        if self._ray_started:
            import ray

            ray.shutdown()
            self._ray_started = False
        if self._mirror is not None:
            self._mirror.stop()  # with the last words of those that were just ended
            self._mirror = None
        self._private.stop()
        if self._orphan_reaper is not None:
            self._orphan_reaper.close()
            self._orphan_reaper = None
        if self.redis is not None:
            self.redis.stop()
            self.redis = None


def _join(address: str, **options: Any) -> None:
    """``ray.init`` of a cluster. Raises ResourceError in a sentence where Ray has many lines."""
    import ray

    try:
        ray.init(address=address, **options)
    except Exception as error:  # Ray raises a dozen kinds
        ray.shutdown()
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ResourceError(
            f"the Ray cluster at {address} cannot be joined ({first}): is it healthy, of this "
            "version of Ray, and does its token lie in ~/.ray/auth_token or RAY_AUTH_TOKEN_PATH?"
        ) from error


def _start_node(**options: Any) -> None:
    """``ray.init`` on this machine. Ray gives its own daemons 30 s, which a busy machine exceeds
    now and then."""
    import ray

    for attempt in range(1, NODE_ATTEMPTS + 1):
        try:
            ray.init(**options)
            return
        except Exception as error:  # Ray raises a plain one
            ray.shutdown()
            if "timed out during startup" not in str(error):
                raise
            if attempt == NODE_ATTEMPTS:
                raise ResourceError(
                    f"Ray did not start on this machine within 30 s, {attempt} times: it is too "
                    "busy, stop other work"
                ) from error
            log.warning("Ray did not start within 30 s; trying again")


def free_port() -> int:
    """A TCP port on loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
