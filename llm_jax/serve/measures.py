"""What Prometheus reads at /metrics."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

__all__ = ["CONTENT_TYPE_LATEST", "Measures"]

_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5)


class Measures:
    """Counters of one server; a registry of their own, so that two servers of a process do not mix."""

    def __init__(self, running: Callable[[], int], waiting: Callable[[], int]):
        self.registry = registry = CollectorRegistry()
        named = {"namespace": "llm_jax", "registry": registry}
        self.requests = Counter("requests", "requests answered", ("endpoint", "status"), **named)
        self.prompt_tokens = Counter("prompt_tokens", "tokens of accepted prompts", **named)
        self.generated_tokens = Counter("generated_tokens", "tokens generated", **named)
        self.cancelled = Counter(
            "cancelled_completions", "ended by a client that left, a time limit or a stop", **named
        )
        self.time_to_first_token = Histogram(
            "time_to_first_token_seconds", "from a request to its first token, waiting included",
            buckets=_FIRST, **named,
        )  # fmt: skip
        self.time_per_token = Histogram(
            "time_per_token_seconds", "between tokens, the mean of each completion",
            buckets=_PER_TOKEN, **named,
        )  # fmt: skip
        Gauge("running_completions", "in slots now", **named).set_function(running)
        Gauge("waiting_completions", "waiting for a slot now", **named).set_function(waiting)

    def page(self) -> bytes:
        return generate_latest(self.registry)
