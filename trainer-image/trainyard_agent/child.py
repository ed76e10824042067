"""`python -P -m trainyard_agent.child PARENT ARG...`: become `python ARG...`, tied to the life of PARENT.

A program of its own because code between fork and exec is not safe in a process with threads (the agent has
some); PR_SET_PDEATHSIG survives the exec.
"""

from __future__ import annotations

import os
import signal
import sys

from trainyard_agent.prctl import die_with_parent


def spawn(arguments: list[str], env: dict[str, str], *, channel: int | None = None) -> int:
    """Starts `python ARGUMENTS` as a child that dies with this process; its PID.

    `channel` becomes the child's descriptor 3. Call it from the main thread only (see `die_with_parent`).
    Raises OSError.
    """
    actions = [] if channel is None else [(os.POSIX_SPAWN_DUP2, channel, 3)]
    argv = [sys.executable, "-P", "-m", "trainyard_agent.child", str(os.getpid()), *arguments]
    return os.posix_spawn(
        sys.executable,
        argv,
        env,
        file_actions=actions,
        setsigmask=[],
        setsigdef=[signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD],
    )


def main() -> None:
    parent, *arguments = sys.argv[1:]
    die_with_parent(int(parent))
    # -P: the working directory is the user's; a file there must not shadow a module of ours.
    os.execv(sys.executable, [sys.executable, "-P", *arguments])  # noqa: S606 - that is its purpose


if __name__ == "__main__":
    main()
