"""Prometheus metrics of one server, in a registry of its own.

vLLM's names where they mean the same, so that its dashboards work; ours begin with ``atomsteer_``. Label values are
bounded: presets, arms and atoms are those that exist, never what a client sent. `docs/operations.md` lists them all.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from atoms.engine import EngineStats
from atoms.errors import AtomsteerError
from atoms.manifest import Manifest
from server.errors import error_kind
from server.experiments.recording import Recorder
from server.steering import ResolvedSteering

_LATENCY = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0)
_FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_BETWEEN_TOKENS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_REMEMBERED_MIXES = 65_536
_KL = (0.0, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.45, 0.7, 1.0, 2.0, 5.0)


class SteeringMetrics:
    """What is counted of steering, on either server. `registry` None is one of its own."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self._registry = registry = registry or CollectorRegistry()
        self._requests = Counter(
            "atomsteer_requests", "Generation requests", ("preset", "experiment", "arm", "status"), registry=registry
        )
        self._atoms = Counter("atomsteer_atom_requests", "Requests that an atom steered", ("atom",), registry=registry)
        self._kl = Histogram(
            "atomsteer_predicted_kl", "Predicted KL of the mix, nats a token", buckets=_KL, registry=registry
        )
        self._measured = Histogram(
            "atomsteer_measured_kl", "KL measured on responses of experiments, nats a token", ("experiment", "arm"),
            buckets=_KL, registry=registry,
        )  # fmt: skip
        self._unmeasured = Counter(
            "atomsteer_measured_kl_skipped", "Responses drawn to be measured, for which there was no budget or no time",
            registry=registry,
        )  # fmt: skip
        self._steering_errors = Counter(
            "atomsteer_steering_errors", "Requests refused for their steering", ("code",), registry=registry
        )

        self._limited = Counter("atomsteer_rate_limited", "Requests refused for their key's quota", ("limit",),
                                registry=registry)  # fmt: skip

        self._mixes = Counter("atomsteer_mix_requests", "Steered requests by whether their mix was used before",
                              ("mix",), registry=registry)  # fmt: skip
        self._known_mixes: OrderedDict[str, None] = OrderedDict()
        self._refused_keys = Counter(
            "atomsteer_refused_keys", "Requests with a wrong key, or without one", registry=registry
        )
        self._reloads = Counter("atomsteer_reloads", "Reloads of the package", ("result",), registry=registry)
        for result in (
            "done",
            "failed",
        ):  # there from the start: what appears with a 1 has not increased for Prometheus
            self._reloads.labels(result)

    def key_refused(self) -> None:
        """A request was answered 401."""
        self._refused_keys.inc()

    @contextmanager
    def counting_reloads(self) -> Iterator[None]:
        """Counts the block as a reload, failed if it raises."""
        try:
            yield
        except Exception:
            self._reloads.labels("failed").inc()
            raise
        self._reloads.labels("done").inc()

    def describe(self, manifest: Callable[[], Manifest]) -> None:
        """Shows at each scrape which version of which package is served."""
        self._registry.register(_PackageCollector(manifest))

    def limited(self, limit: str) -> None:
        """A request was refused; `limit` is ``requests``, ``tokens`` or ``concurrent_requests``."""
        self._limited.labels(limit).inc()

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)

    def steered(self, steering: ResolvedSteering) -> None:
        """A request's mix was resolved."""
        self._kl.observe(steering.predicted_kl)
        for atom, _ in steering.mix:
            self._atoms.labels(atom).inc()
        if steering.mix:
            self._mixes.labels("known" if steering.digest in self._known_mixes else "new").inc()
            self._known_mixes[steering.digest] = None
            self._known_mixes.move_to_end(steering.digest)
            if len(self._known_mixes) > _REMEMBERED_MIXES:
                self._known_mixes.popitem(last=False)

    def drift_measured(self, steering: ResolvedSteering, kl: float) -> None:
        """A response of an experiment was read again."""
        self._measured.labels(steering.experiment or "", steering.arm or "").observe(kl)

    def drift_skipped(self) -> None:
        """A response was drawn to be measured, and could not be."""
        self._unmeasured.inc()

    def watch(self, recorder: Recorder) -> None:
        """Shows at each scrape how many records of experiments wait to be written, and how many had to be dropped."""
        self._registry.register(_RecordCollector(recorder))

    @contextmanager
    def counting_refusals(self) -> Iterator[None]:
        """Counts the error with which the block refuses a request's steering, by its code in the error table."""
        try:
            yield
        except AtomsteerError as error:
            self._steering_errors.labels(error_kind(error).code).inc()
            raise

    def request_finished(self, steering: ResolvedSteering | None, status: int, seconds: float) -> None:
        """A generation request ended; `status` is 500 where a stream broke off and 499 where the client left."""
        labels = (steering.preset, steering.experiment, steering.arm) if steering else (None, None, None)
        self._requests.labels(*(label or "" for label in labels), str(status)).inc()


class ServerMetrics(SteeringMetrics):
    """What the embedded server counts. `stats` is read at each scrape."""

    def __init__(self, model_name: str, stats: Callable[[], EngineStats]) -> None:
        super().__init__()
        registry = self._registry
        self._model_name = model_name
        registry.register(_LoadCollector(model_name, stats))
        label = ("model_name",)
        prompt_tokens = Counter("vllm:prompt_tokens", "Prompt tokens processed", label, registry=registry)
        generated = Counter("vllm:generation_tokens", "Tokens generated", label, registry=registry)
        self._prompt_tokens, self._generated = prompt_tokens.labels(model_name), generated.labels(model_name)
        self._first_token = self._seconds("vllm:time_to_first_token_seconds", "To the first token", _FIRST_TOKEN)
        self._latency = self._seconds("vllm:e2e_request_latency_seconds", "Request to last token", _LATENCY)
        self._gap = self._seconds("vllm:inter_token_latency_seconds", "From token to token", _BETWEEN_TOKENS)

    def sequence_started(self, prompt_tokens: int, seconds: float) -> None:
        """A sequence's first token came, `seconds` after the request."""
        self._prompt_tokens.inc(prompt_tokens)
        self._first_token.observe(seconds)

    def tokens_generated(self, count: int, gap: float | None) -> None:
        """`count` tokens came, `gap` seconds after the sequence's token before; None for its first."""
        self._generated.inc(count)
        if gap is not None:
            for _ in range(count):
                self._gap.observe(gap / count)

    def request_finished(self, steering: ResolvedSteering | None, status: int, seconds: float) -> None:
        super().request_finished(steering, status, seconds)
        if status == 200:
            self._latency.observe(seconds)

    def _seconds(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        """A histogram of seconds, of the one model."""
        return Histogram(name, text, ("model_name",), buckets=buckets, registry=self._registry).labels(self._model_name)


class _LoadCollector(Collector):
    """Running and waiting sequences, asked for at each scrape rather than kept in step."""

    def __init__(self, model_name: str, stats: Callable[[], EngineStats]) -> None:
        self._model_name = model_name
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        for name, text, value in (
            ("vllm:num_requests_running", "Sequences being decoded", stats.running),
            ("vllm:num_requests_waiting", "Sequences waiting for a slot", stats.waiting),
        ):
            family = GaugeMetricFamily(name, text, labels=["model_name"])
            family.add_metric([self._model_name], value)
            yield family
        yield SummaryMetricFamily("atomsteer_compose_seconds", "Composing the weights of a mix", stats.mixes_composed,
                                  stats.compose_seconds)  # fmt: skip


class _PackageCollector(Collector):
    """The package in force: a label set that changes with it, and always one series."""

    def __init__(self, manifest: Callable[[], Manifest]) -> None:
        self._manifest = manifest

    def collect(self) -> Iterable[Metric]:
        manifest = self._manifest()
        family = GaugeMetricFamily("atomsteer_package_info", "The package that is served; always 1",
                                   labels=["package", "version", "content_hash"])  # fmt: skip
        family.add_metric([manifest.name, manifest.version, manifest.content_hash[:12]], 1)
        yield family


class _RecordCollector(Collector):
    """The recorder's queue, asked at each scrape."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily("atomsteer_experiment_records_waiting", "Records of experiments not written yet",
                                self._recorder.waiting)  # fmt: skip
        yield CounterMetricFamily("atomsteer_experiment_records_lost", "Records of experiments dropped by a full queue",
                                  self._recorder.lost)  # fmt: skip
