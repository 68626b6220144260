"""Where metrics go besides the run folder: Prometheus gauges, or what a user adds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from avatar_rl.cluster.telemetry.metrics import describe
from avatar_rl.common.errors import ResourceError

if TYPE_CHECKING:
    from prometheus_client import Gauge


class Sink(Protocol):
    """Anything that wants each step's metrics as well (Prometheus, a user's tracker)."""

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None: ...

    def samples(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Sampled completions (``Sample``); ``name`` is rollout or eval."""

    def close(self) -> None: ...


class PrometheusSink:
    """Serves each metric as the gauge ``avatar_<name>{run="<id>"}`` over HTTP, on loopback unless
    told otherwise.

    Raises ResourceError when the port is taken.
    """

    def __init__(self, run_id: str, port: int, host: str = "127.0.0.1") -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        self.run_id = run_id
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=self._registry)
        except OSError as error:
            raise ResourceError(
                f"output.prometheus_port {port} on {host}: {error.strerror}; give another port, "
                "or null for none"
            ) from error

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        from prometheus_client import Gauge

        for name, value in {"step": float(step), **metrics}.items():
            if value is None:
                continue
            label = prometheus_name(name)
            if label not in self._gauges:
                entry = describe(name)
                meaning = entry.meaning if entry else name
                self._gauges[label] = Gauge(
                    label, meaning, ["run"], registry=self._registry
                ).labels(run=self.run_id)
            self._gauges[label].set(value)

    def samples(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Prometheus takes numbers only."""

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def prometheus_name(name: str) -> str:
    """ "reward/mean" -> "avatar_reward_mean"; other characters that Prometheus forbids become
    underscores too."""
    return "avatar_" + re.sub(r"[^A-Za-z0-9_]", "_", name)
