"""A stage that fails on one rank, for the launcher's tests."""

from __future__ import annotations

import os
import time

from xar_cli.config.schema import Section


class Nothing(Section):
    """No settings."""


def fail_on_rank_1(settings: Nothing) -> dict:
    if os.environ["RANK"] == "1":
        return {"never": 1 // 0}
    time.sleep(60)
    return {}
