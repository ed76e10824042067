"""What the agent reads from its environment (`contract.Env`), once, at its start."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainyard_api import contract
from trainyard_api.contract import Env

ZYGOTE = "TRAINYARD_ZYGOTE"
"""off: start every launcher as a fresh process."""
TERMINATION_LOG = "TRAINYARD_TERMINATION_LOG"
"""Other path for the termination message (tests)."""
LONELY_SECONDS = "TRAINYARD_LONELY_SECONDS"
"""Seconds without an answer, after the workers ended, until the agent ends too (600)."""
AUTH_SECONDS = "TRAINYARD_AUTH_SECONDS"
"""Seconds of refusals (401, 403, 426) until an idle agent ends (120)."""


class SettingsError(ValueError):
    """The pod's environment is not what the contract says. The message names the variable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    run_uid: str
    pod_name: str
    pod_uid: str
    pod_ip: str
    node_index: int
    procs_per_node: int
    coordinator_url: str
    coordinator_ca: str
    """PEM; empty: the system's authorities."""
    token_file: Path
    command: tuple[str, ...]
    preload: tuple[str, ...]
    grace_seconds: float
    runtime_dir: Path
    agent_socket: Path
    uploader_socket: Path
    checkpoint_uri: str
    """Empty: there is no uploader."""
    use_zygote: bool
    termination_log: Path
    lonely_seconds: float
    auth_seconds: float

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Settings:
        """Raises SettingsError that names the variable."""
        runtime = Path(env.get(Env.RUNTIME_DIR) or contract.RUNTIME_DIR)
        return cls(
            run_uid=_text(env, Env.RUN_UID),
            pod_name=_text(env, Env.POD_NAME),
            pod_uid=_text(env, Env.POD_UID),
            pod_ip=_text(env, Env.POD_IP),
            node_index=int(_number(env, Env.NODE_INDEX, low=0)),
            procs_per_node=int(_number(env, Env.PROCS_PER_NODE, default=1, low=1)),
            coordinator_url=_url(env),
            coordinator_ca=env.get(Env.COORDINATOR_CA, ""),
            token_file=Path(env.get(Env.TOKEN_FILE) or contract.TOKEN_FILE),
            command=parse_command(_text(env, Env.COMMAND)),
            preload=tuple(m.strip() for m in env.get(Env.PRELOAD, "").split(",") if m.strip()),
            grace_seconds=_number(env, Env.GRACE_SECONDS, default=30, low=0),
            runtime_dir=runtime,
            agent_socket=Path(env.get(Env.AGENT_SOCKET) or runtime / "agent.sock"),
            uploader_socket=Path(env.get(Env.UPLOADER_SOCKET) or runtime / "uploader.sock"),
            checkpoint_uri=env.get(Env.CHECKPOINT_URI, ""),
            use_zygote=env.get(ZYGOTE, "").lower() not in ("off", "0", "false", "no"),
            termination_log=Path(env.get(TERMINATION_LOG) or contract.TERMINATION_LOG),
            lonely_seconds=_number(env, LONELY_SECONDS, default=600, low=0),
            auth_seconds=_number(env, AUTH_SECONDS, default=120, low=0),
        )

    def worker_env(self, environ: Mapping[str, str]) -> dict[str, str]:
        """The agent's environment as its children may see it: no way to the coordinator in it, and no attempt."""
        hidden = (Env.COORDINATOR_URL, Env.COORDINATOR_CA, Env.TOKEN_FILE, Env.ATTEMPT, Env.UPLOADER_SOCKET)
        env = {name: value for name, value in environ.items() if name not in hidden}
        env[Env.RUNTIME_DIR] = str(self.runtime_dir)
        env[Env.AGENT_SOCKET] = str(self.agent_socket)
        if self.checkpoint_uri:
            env[Env.UPLOADER_SOCKET] = str(self.uploader_socket)
        return {str(name): value for name, value in env.items()}


def parse_command(text: str) -> tuple[str, ...]:
    """[script.py, arg...] or ["-m", module, arg...] from JSON. Raises SettingsError."""
    try:
        command = json.loads(text)
    except ValueError as error:
        raise SettingsError(f"{Env.COMMAND} is not JSON: {error}") from None
    if not isinstance(command, list) or not command or not all(isinstance(c, str) for c in command):
        raise SettingsError(f"{Env.COMMAND} must be a JSON list of strings that is not empty")
    if command[0] == "-m" and len(command) == 1:
        raise SettingsError(f"{Env.COMMAND} names no module after -m")
    return tuple(command)


def _text(env: Mapping[str, str], name: str) -> str:
    value = env.get(name, "")
    if not value:
        raise SettingsError(f"{name} is not set; the agent is started by the operator, which sets it")
    return value


def _number(env: Mapping[str, str], name: str, *, low: float, default: float | None = None) -> float:
    text = env.get(name) or (None if default is None else str(default))
    if text is None:
        raise SettingsError(f"{name} is not set; the agent is started by the operator, which sets it")
    try:
        value = float(text)
    except ValueError:
        raise SettingsError(f"{name} must be a number, not {text!r}") from None
    if not low <= value < float("inf"):
        raise SettingsError(f"{name} must be at least {low:g}, not {text}")
    return value


def _url(env: Mapping[str, str]) -> str:
    url = _text(env, Env.COORDINATOR_URL)
    if not url.startswith(("https://", "http://")):
        raise SettingsError(f"{Env.COORDINATOR_URL} must begin with https:// (http:// in tests), not {url!r}")
    return url.rstrip("/")
