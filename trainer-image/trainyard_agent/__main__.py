"""`python -m trainyard_agent`: see the package's docstring and docs/architecture.md part 3."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from trainyard_agent import termination
from trainyard_agent.agent import Agent
from trainyard_agent.log import say
from trainyard_agent.settings import TERMINATION_LOG, Settings, SettingsError
from trainyard_api.contract import TERMINATION_LOG as DEFAULT_LOG
from trainyard_api.contract import ExitCode


def main() -> int:
    """Exit code of the agent; 78 (with one line that says why) when its environment is not usable."""
    try:
        agent = Agent(Settings.from_env(os.environ), os.environ)
    except (SettingsError, OSError, ValueError) as error:
        say(f"cannot start: {error}")
        text = termination.render(
            attempt=0,
            outcome="misconfigured",
            exit_code=ExitCode.CONFIG,
            step=None,
            failure=None,
            message=str(error),
        )
        termination.write(Path(os.environ.get(TERMINATION_LOG) or DEFAULT_LOG), text)
        return ExitCode.CONFIG
    return agent.run()


if __name__ == "__main__":
    code = main()
    # No interpreter teardown: the HTTP threads may be inside a request, and nothing is left to clean up.
    sys.stdout.flush()
    os._exit(code)
