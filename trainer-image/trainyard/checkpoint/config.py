"""Where and when checkpoints are written. Inside a TrainingRun it comes from the environment, else from the script."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from trainyard_api.contract import Env


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepBest:
    """Retention by a logged metric, beside the newest ones. Raises ValueError."""

    metric: str
    """A name that the module logs; a commit at which it was not logged yet never counts as one of the best."""
    mode: str = "min"
    count: int = 1

    def __post_init__(self) -> None:
        if not self.metric or ":" in self.metric:
            raise ValueError(f"keep_best.metric: {self.metric!r} is no name of a metric (without ':')")
        if self.mode not in ("min", "max"):
            raise ValueError(f"keep_best.mode: {self.mode!r} is neither 'min' nor 'max'")
        if self.count < 1:
            raise ValueError(f"keep_best.count: {self.count} is less than 1")

    @classmethod
    def parse(cls, text: str) -> KeepBest:
        """`metric:min|max:count`."""
        try:
            metric, mode, count = text.split(":")
            return cls(metric=metric, mode=mode, count=int(count))
        except ValueError as error:
            raise ValueError(
                f"{Env.CHECKPOINT_KEEP_BEST}: {text!r} is not metric:min|max:count ({error})"
            ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """Raises ValueError that names the field.

    With neither `every_n_steps` nor `every_n_seconds`, a checkpoint is written at each epoch's end. The end of the run
    always has one.
    """

    uri: str
    """`s3://bucket/prefix` or `file:///absolute/path`."""
    every_n_steps: int | None = None
    """Optimizer steps."""
    every_n_seconds: float | None = None
    auto: bool = False
    """Choose the interval from what a save costs and how often the run fails; not together with the two above."""
    on_exception: bool = False
    """Save when the program raises, where the state is sound."""
    keep: int = 3
    """Newest commits to keep; at least 2."""
    keep_best: KeepBest | None = None
    resume: str = "auto"
    """"auto": the newest that is whole, the beginning if there never was one. "required": the same, but never the
    beginning. "never": the beginning, even though there are checkpoints (they stay until newer ones replace them).
    Digits: that step."""
    local: bool = False
    """Keep the newest checkpoint on the nodes too, for a fast restart. In a TrainingRun: on unless it says no."""
    copies: int = 0
    """On how many other nodes to keep a copy of each node's shards."""
    endpoint: str | None = None
    """URL of an S3 server other than AWS; None leaves it to AWS_ENDPOINT_URL."""
    region: str | None = None
    run: str | None = None
    """Name under `uri`; None: named after the script."""
    attempt: int | None = None
    """None: one more than the newest in the log."""

    def __post_init__(self) -> None:
        if not re.match(r"s3://[^/]+|file:///", self.uri):
            raise ValueError(
                f"checkpoint.uri: {self.uri!r} is neither s3://bucket/prefix nor file:///absolute/path"
            )
        if self.every_n_steps is not None and self.every_n_steps < 1:
            raise ValueError(f"checkpoint.every_n_steps: {self.every_n_steps} is less than 1")
        if self.every_n_seconds is not None and self.every_n_seconds <= 0:
            raise ValueError(f"checkpoint.every_n_seconds: {self.every_n_seconds} is not positive")
        if self.auto and (self.every_n_steps is not None or self.every_n_seconds is not None):
            raise ValueError(
                "checkpoint.auto: chooses the interval; leave out every_n_steps and every_n_seconds"
            )
        if self.resume not in ("auto", "never", "required") and not self.resume.isdecimal():
            raise ValueError(
                f"checkpoint.resume: {self.resume!r} is none of never, auto, required, or a step"
            )
        if self.copies < 0:
            raise ValueError(f"checkpoint.copies: {self.copies} is negative")
        if self.keep < 2:
            raise ValueError(
                f"checkpoint.keep: {self.keep} is less than 2: a damaged newest one would be the only one"
            )
        if self.run is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", self.run):
            raise ValueError(f"checkpoint.run: {self.run!r} is not a plain name")

    @property
    def run_id(self) -> str:
        """UID of the run, or the script's name on a laptop."""
        stem = re.sub(r"[^A-Za-z0-9._-]", "-", Path(sys.argv[0] or "session").stem) or "session"
        return self.run or f"local-{stem}"

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> CheckpointConfig | None:
        """None when there is no TRAINYARD_CHECKPOINT_URI. Raises ValueError that names the variable."""
        uri = env.get(Env.CHECKPOINT_URI)
        if not uri:
            return None
        return cls(
            uri=uri,
            every_n_steps=_number(env, Env.CHECKPOINT_EVERY_STEPS, int),
            every_n_seconds=_number(env, Env.CHECKPOINT_EVERY_SECONDS, float),
            auto=env.get(Env.CHECKPOINT_AUTO) == "1",
            on_exception=env.get(Env.CHECKPOINT_ON_EXCEPTION) == "1",
            keep=max(2, _number(env, Env.CHECKPOINT_KEEP, int) or 3),
            keep_best=KeepBest.parse(best) if (best := env.get(Env.CHECKPOINT_KEEP_BEST)) else None,
            resume=env.get(Env.CHECKPOINT_RESUME) or "auto",
            local=env.get(Env.CHECKPOINT_LOCAL) == "1",
            copies=_number(env, Env.CHECKPOINT_COPIES, int) or 0,
            endpoint=env.get(Env.CHECKPOINT_ENDPOINT) or None,
            region=env.get(Env.CHECKPOINT_REGION) or None,
            run=env.get(Env.RUN_UID) or None,
            attempt=_number(env, Env.ATTEMPT, int),
        )


_T = TypeVar("_T", int, float)


def _number(env: Mapping[str, str], name: str, kind: type[_T]) -> _T | None:
    text = env.get(name)
    if not text:
        return None
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name}: {text!r} is not a number") from None
