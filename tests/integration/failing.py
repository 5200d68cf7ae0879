"""A stage that fails on one rank, for the launcher's tests."""

from __future__ import annotations

import atexit
import os
import time
from contextlib import nullcontext
from pathlib import Path

from xar_cli.config.schema import Section
from xar_cli.distributed import process_group
from xar_cli.errors import UserError


class Nothing(Section):
    """No settings."""


class Attempts(Section):
    """A file that gets a line from every rank that starts, and which ranks end with a UserError."""

    path: Path
    ranks: tuple[int, ...]
    exit_code: int = 2
    in_a_group: bool = False  # the others wait for the failing rank; else they go on with work of their own


def end_with_user_error(settings: Attempts) -> dict:
    """Bad input that a rank finds by itself; all the others wait for it, or work on."""
    rank = int(os.environ["RANK"])
    with settings.path.open("a") as file:
        file.write(f"{rank}\n")
    with process_group("cpu") if settings.in_a_group else nullcontext() as ranks:
        if rank in settings.ranks:
            raise UserError(f"Bad input on {len(settings.ranks)} ranks.", "Mend it.", settings.exit_code)
        if ranks is not None:
            ranks.barrier()
        time.sleep(60)
    return {}


class Work(Section):
    """What ranks do: rank 0 nothing, the others sleep for some seconds, and then fail if they are asked to."""

    seconds: float
    error: str = ""  # "fault" or "user"
    seconds_to_end: float = 0  # that a rank which fails still takes to end its process


def work(settings: Work) -> dict:
    """Ranks that work apart, each for as long as it takes."""
    with process_group("cpu") as ranks:
        if not ranks.is_main:
            atexit.register(time.sleep, settings.seconds_to_end)
            time.sleep(settings.seconds)
            if settings.error == "user":
                raise UserError("Bad input on one rank.", "Mend it.")
            if settings.error:
                raise ZeroDivisionError
    return {"rank": ranks.rank}


def fail_once(settings: Attempts) -> dict:
    """A real fault of the last rank in the first attempt."""
    rank, last = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")) - 1
    with settings.path.open("a") as file:
        file.write(f"{rank}\n")
    if rank == last and settings.path.read_text().count(str(last)) == 1:
        raise RuntimeError("a passing fault")
    return {"done": True}


def fail_on_rank_1(settings: Nothing) -> dict:
    if os.environ["RANK"] == "1":
        return {"never": 1 // 0}
    time.sleep(60)
    return {}
