"""docs/metrics.md, made from the metrics themselves."""

from __future__ import annotations

from collections.abc import Iterator

from trainyard_operator.collectors import FLEET, INTERNALS, PER_RUN, RUN_LABELS
from trainyard_operator.metrics import Described, Metrics

HEAD = """\
# Metrics of the operator

Made by `python -m trainyard_operator metrics-doc > docs/metrics.md`; a test fails when this page is not up to
date. The operator serves them at `/metrics` on its web port (8080), as plain HTTP. Seconds are seconds, names are
those of controller-runtime where it has them. Counters start at zero with each process. No counter has the name of a
run in its labels; the gauges that do (`run`) exist only while the run is not finished.

| name | type | labels | meaning |
|---|---|---|---|
"""


def described() -> Iterator[Described]:
    """Every metric: fixed ones, and those that collectors make at a scrape."""
    yield from Metrics().described
    for name, (kind, text, labels) in INTERNALS.items():
        yield Described(name, kind, labels, text)
    for name, (text, labels) in FLEET.items():
        yield Described(name, "gauge", labels, text)
    for name, (text, _) in PER_RUN.items():
        yield Described(name, "gauge", RUN_LABELS, text)


def render() -> str:
    """The whole page."""
    rows = (
        f"| `{m.name}` | {m.kind} | {', '.join(f'`{label}`' for label in m.labels) or '-'} | {m.text} |"
        for m in sorted(described(), key=lambda m: m.name)
    )
    return HEAD + "\n".join(rows) + "\n"
