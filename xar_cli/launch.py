"""How a stage's function gets its processes: this one, under torch's elastic launcher, or already inside a job.

The settings cross the process border once, as one JSON file that every worker reads. Knows no stage.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from torch.distributed import DistError

from xar_cli.config.schema import Section
from xar_cli.distributed import (
    LAST_PORT,
    TIMEOUT_SECONDS,
    AbsentRanksError,
    cores_here,
    local_address,
    port_in_use,
    rank_and_world,
    require_store,
)
from xar_cli.errors import UserError
from xar_cli.logs import log, setup_logs

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

SETTINGS_FILE, LOGS = "settings.json", "logs"
ERROR_FILES = "user-error-{}.json"  # of a rank of this machine; ends the launch
ABSENCE_FILE = "absent-ranks.json"  # does not: another attempt may go better
SECONDS_TO_AGREE = 3.0  # within which ranks end with the same error, if they do
SECONDS_FOR_MACHINES = 1.0  # that the ranks of other machines get for the same
SECONDS_TO_BE_STOPPED = 30.0  # that the launcher gets to stop its ranks
LOOPBACK = "127.0.0.1"
FIRST_PORT, NUM_PORTS = 20_000, 12_000  # for steps of Slurm; Linux takes ports of its own from 32,768 on
STEPS_APART = 31  # steps of one job until ports are those of the next one
SIGNALS_OF_TORCH = "SIGTERM,SIGINT,SIGQUIT"  # that its launcher handles itself; not SIGHUP, which may be ignored
SECONDS_TO_STOP = 600  # what workers get to write a checkpoint after SIGTERM (torch before 2.9: 30, fixed)


@dataclass(frozen=True)
class LaunchOptions:
    """How many processes, and where.

    Attributes:
        nproc_per_node: processes on each machine.
        nnodes: machines.
        node_rank: number of this machine, 0 to nnodes - 1; machine 0 hosts the meeting point.
        rdzv_endpoint: host:port of machine 0; needed with more than one machine.
        max_restarts: how often the processes are started again after one of them failed or a machine went away; not
            after a UserError, which would only come again.
        rdzv_timeout: seconds that the machines wait for each other.
    """

    nproc_per_node: int = 1
    nnodes: int = 1
    node_rank: int = 0
    rdzv_endpoint: str = ""
    max_restarts: int = 0
    rdzv_timeout: int = int(TIMEOUT_SECONDS)

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.nproc_per_node * self.nnodes

    def check(self) -> None:
        """Raise a UserError for numbers that make no job."""
        if self.nproc_per_node < 1 or self.nnodes < 1 or not 0 <= self.node_rank < self.nnodes:
            raise UserError(
                f"Node {self.node_rank} of {self.nnodes} with {self.nproc_per_node} processes makes no job.",
                "--nproc-per-node and --nnodes are at least 1, and --node-rank counts from 0.",
            )
        if self.max_restarts < 0:
            raise UserError(f"--max-restarts {self.max_restarts} is no number of restarts.", "Give 0 or more.")
        if self.nnodes == 1 and self.rdzv_endpoint:
            raise UserError(
                f"--rdzv-endpoint {self.rdzv_endpoint} is where machines meet, and this is a job of one.",
                "Add --nnodes and --node-rank, or leave it out.",
            )
        host, _, port = self.rdzv_endpoint.rpartition(":")
        if self.nnodes > 1 and not (host and port.isdecimal() and 1 <= int(port) <= LAST_PORT):
            raise UserError(
                f"{self.nnodes} machines need a place to meet, and '{self.rdzv_endpoint}' is not one.",
                "Give every machine the same --rdzv-endpoint HOST:PORT, with the host of machine 0.",
            )


@dataclass(frozen=True)
class Place:
    """Where this process stands.

    Attributes:
        rank: its number in the job that it is in already; 0 outside of one.
        world_size: processes of the job, in or to be started.
        ranks_here: of these, on this machine.
        joined: whether it is in a job already.
    """

    rank: int
    world_size: int
    ranks_here: int
    joined: bool


def find_place(options: LaunchOptions, environment: MutableMapping[str, str] = os.environ) -> Place:
    """The place of this process in the job that it is in already, else at the head of the one that is asked for.

    Raises:
        UserError: the options, or RANK and its kin, make no job, or the options contradict the one that this process is
            in.
    """
    starter = "RANK and WORLD_SIZE" if rank_and_world(environment) else "srun"
    if not join_job(environment):
        options.check()
        return Place(0, options.world_size, options.nproc_per_node, joined=False)
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    ranks_here = int(environment.get("LOCAL_WORLD_SIZE", "0"))
    against = _contradictions(options, environment)
    if against:
        here = f", {ranks_here} on a machine" if ranks_here else ""
        raise UserError(
            f"This process is rank {rank} of {world_size}{here}, by {starter}: {' and '.join(against)} "
            f"{'contradicts' if len(against) == 1 else 'contradict'} that.",
            "Leave such flags out, and have srun start one task per GPU (--ntasks-per-node)."
            if starter == "srun"
            else "Leave such flags out inside torchrun or the like; if these variables are left over, unset them.",
        )
    return Place(rank, world_size, ranks_here or 1, joined=True)


def _contradictions(options: LaunchOptions, environment: Mapping[str, str]) -> list[str]:
    """The flags that were given (are not the default) and are not so in the job of this process."""
    world_size, ranks_here = int(environment["WORLD_SIZE"]), int(environment.get("LOCAL_WORLD_SIZE", "0"))
    if ranks_here:
        machines = int(environment.get("GROUP_WORLD_SIZE", -(-world_size // ranks_here)))
        size_fits = {"nproc_per_node": options.nproc_per_node == ranks_here, "nnodes": options.nnodes == machines}
    else:
        size_fits = dict.fromkeys(("nproc_per_node", "nnodes"), options.world_size == world_size)
    machine = environment.get("GROUP_RANK", environment.get("SLURM_NODEID"))
    meeting = f"{environment.get('MASTER_ADDR')}:{environment.get('MASTER_PORT')}"
    fits = {
        **size_fits,
        "node_rank": machine is None or options.node_rank == int(machine),
        "rdzv_endpoint": options.rdzv_endpoint == meeting,
        "max_restarts": False,  # whoever started this process may start it again
    }
    values = {name: getattr(options, name) for name in fits}
    given = {name: value for name, value in values.items() if value != getattr(LaunchOptions, name)}
    return [f"--{name.replace('_', '-')} {value}" for name, value in given.items() if not fits[name]]


def run(stage: str, settings: Section, options: LaunchOptions) -> Mapping[str, Any]:
    """Run a stage's function in as many processes as asked for, and give what rank 0 returned.

    Inside somebody's torchrun, or as a task of `srun`, this process joins as the rank that it is; the options must not
    contradict that. Otherwise one process runs it right here, and more of them, or one that is to be started again
    after a failure, run under torch's elastic launcher.

    Args:
        stage: `module:function`; the function takes the settings and returns JSON-ready values.
        settings: a pydantic model; sent to the workers as JSON.
        options: how many processes, and where.

    Raises:
        UserError: as the stage raised it in a worker, as `find_place`, or the machines did not meet in time.
        SystemExit: a worker failed otherwise; its traceback is on stderr.
    """
    place = find_place(options)
    if place.joined or (place.world_size == 1 and not options.max_restarts):
        setup_logs(place.rank)
        if place.world_size > 1:
            meeting = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            log.info("Joining as rank %d of %d at %s.", place.rank, place.world_size, meeting)
        return _function(stage)(settings)
    return _launch(stage, settings, options)


def join_job(environment: MutableMapping[str, str]) -> bool:
    """Whether this process is one of a job already; under Slurm, RANK and the like are filled in from its variables.

    Raises:
        UserError: RANK and its kin make no job.
    """
    if rank_and_world(environment) is not None:
        return True
    # Of the step: a shell inside an allocation is a step of one task, and keeps the allocation's SLURM_NTASKS.
    tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "1")
    if int(tasks) < 2 or "SLURM_PROCID" not in environment:
        return False
    if environment.get("SLURM_STEP_NODELIST") is None:  # inside sbatch, but not started by srun
        return False
    environment.update(
        RANK=environment["SLURM_PROCID"],
        WORLD_SIZE=tasks,
        LOCAL_RANK=environment["SLURM_LOCALID"],
        MASTER_ADDR=environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
        MASTER_PORT=environment.get("MASTER_PORT") or str(_port_of_step(environment)),
    )
    of_nodes = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE")
    if of_nodes:
        environment["LOCAL_WORLD_SIZE"] = str(largest_count(of_nodes))
    return rank_and_world(environment) is not None


def _port_of_step(environment: Mapping[str, str]) -> int:
    """A port for the meeting of a job step: another one for each step of a job, below those that Linux hands out."""
    job, step = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_STEP_ID", "0"))
    return FIRST_PORT + (job * STEPS_APART + step) % NUM_PORTS


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list: 'gpu[07-09,12],cpu1' -> 'gpu07'."""
    prefix, bracket, rest = nodelist.partition("[")
    if not bracket or "," in prefix:
        return nodelist.split(",")[0]
    number = rest.split("]")[0].split(",")[0].split("-")[0]
    return prefix + number


def largest_count(tasks_per_node: str) -> int:
    """The most tasks that a node has by Slurm's list of them: '4(x2),3' -> 4; the others are then planned with care."""
    return max(int(part.partition("(")[0]) for part in tasks_per_node.split(","))


def _launch(stage: str, settings: Section, options: LaunchOptions) -> Mapping[str, Any]:
    """Start the workers of this machine under torch's elastic launcher and wait for them."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    # Some cores for each worker, unless the person has said how many.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores_here() // options.nproc_per_node)))
    # A store of their own for the workers each time they are started: in the launcher's, which they would share, the
    # addresses of a former attempt are still written.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    setup_logs()
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it would say is said below
    before = _pass_on_as_sigterm()
    with tempfile.TemporaryDirectory(prefix="xar-launch-") as name:
        folder = Path(name)
        (folder / SETTINGS_FILE).write_text(settings.model_dump_json(), encoding="utf-8")
        target = f"{type(settings).__module__}:{type(settings).__qualname__}"
        try:
            config = _launch_config(stage, options, folder / LOGS)  # first: a mistyped host is told before any waiting
            if options.node_rank:
                host, _, port = options.rdzv_endpoint.rpartition(":")
                require_store(host, int(port), options.rdzv_timeout)
            results = elastic_launch(config, _worker)(stage, target, str(folder), os.getpid())
        except ChildFailedError as error:
            _raise_user_error(folder)
            crash = _crash(folder / LOGS) if (folder / ABSENCE_FILE).exists() else None
            if crash is not None:  # it is why the others missed that rank
                log.error("Rank %d of this machine failed:\n%s", *crash)
                raise SystemExit(1) from None
            _raise_user_error(folder, ABSENCE_FILE)
            rank, failure = error.get_first_failure()
            log.error("Rank %s failed:\n%s", rank, _traceback(failure.message))
            raise SystemExit(exit_code(failure.exitcode)) from None
        except SignalException as error:
            _raise_user_error(folder)
            raise SystemExit(128 + error.sigval) from None
        except (RendezvousError, DistError) as error:
            _raise_user_error(folder)
            absent = f"The {options.nnodes} machines did not meet at {options.rdzv_endpoint}, or one went away: {error}"
            raise UserError(
                f"The port of {options.rdzv_endpoint} is in use." if port_in_use(error) else absent,
                "Check that machine 0 is up, that the port is free and open, and that all name the same endpoint.",
                exit_code=1,
            ) from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return results[min(results)]


def _pass_on_as_sigterm() -> dict[signal.Signals, Any]:
    """Turn signals that the elastic launcher does not pass on into SIGTERM; gives the handlers before.

    Slurm's early warning is often SIGUSR1; a terminal that closes sends SIGHUP, which stays ignored under nohup.
    """
    numbers = [signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return {number: signal.signal(number, lambda *_: os.kill(os.getpid(), signal.SIGTERM)) for number in numbers}


def _launch_config(stage: str, options: LaunchOptions, logs: Path) -> LaunchConfig:
    """What the elastic launcher is told; `logs` is a folder for what it notes of its workers."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    single = options.nnodes == 1
    known = {field.name for field in fields(LaunchConfig)}
    newer = {"shutdown_timeout": SECONDS_TO_STOP, "signals_to_handle": SIGNALS_OF_TORCH}  # not in torch 2.6
    return LaunchConfig(
        min_nodes=options.nnodes,
        max_nodes=options.nnodes,
        nproc_per_node=options.nproc_per_node,
        logs_specs=DefaultLogsSpecs(log_dir=str(logs)),
        run_id=f"xar-{stage}",
        rdzv_backend="c10d",
        rdzv_endpoint=f"{LOOPBACK}:0" if single else options.rdzv_endpoint,
        rdzv_configs={
            "is_host": options.node_rank == 0,
            "join_timeout": options.rdzv_timeout,
            "read_timeout": options.rdzv_timeout,
        },
        # Never by the machine's own name: it may lead nowhere, and often stands for the loopback address.
        local_addr=LOOPBACK if single else _address_towards(options.rdzv_endpoint),
        max_restarts=options.max_restarts,
        start_method="spawn",
        monitor_interval=0.2,
        **{name: value for name, value in newer.items() if name in known},  # type: ignore[arg-type]
    )


def _address_towards(endpoint: str) -> str:
    host, _, port = endpoint.rpartition(":")
    try:
        return local_address(host, int(port))
    except OSError as error:
        raise UserError(
            f"There is no way from here to {endpoint}: {error}.", "Check the host name and the network."
        ) from None


def _traceback(message: Any) -> str:
    """The traceback in what the elastic launcher keeps of a failure, or all of it."""
    details = message.get("extraInfo", {}) if isinstance(message, dict) else {}
    return str(details.get("py_callstack", message)).rstrip()


def _crash(logs: Path) -> tuple[int, str] | None:
    """Local rank and traceback of the first rank that failed in the last attempt, as torch's launcher keeps them."""
    attempts = sorted(logs.glob("*/attempt_*"), key=lambda folder: int(folder.name.rpartition("_")[2]))
    files = sorted(attempts[-1].glob("*/error.json")) if attempts else []
    return (int(files[0].parent.name), _traceback(json.loads(files[0].read_text())["message"])) if files else None


def exit_code(code: int) -> int:
    """A worker's exit code as a shell gives it: one that was killed by signal 9 has 137."""
    return 128 - code if code < 0 else code or 1


def _raise_user_error(folder: Path, pattern: str = ERROR_FILES.format("*")) -> None:
    """Raise the UserError that a worker left behind, if one did."""
    for path in sorted(folder.glob(pattern)):
        raise UserError(**json.loads(path.read_text(encoding="utf-8")))


def _leave_error(path: Path, error: UserError) -> None:
    """Write an error where the launcher finds it, whole or not at all."""
    values = {"message": error.message, "next_step": error.next_step, "exit_code": error.exit_code}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(values), encoding="utf-8")
    temporary.replace(path)


def _worker(stage: str, settings_class: str, folder_name: str, launcher: int) -> Mapping[str, Any]:
    """What runs in every started process.

    A UserError ends the launch. Where all ranks of this machine have one, the launcher is told to stop. One that a rank
    has alone is a failure of that rank, so that the launcher stops the others; in the attempt that may follow, and in a
    rank that starts late, nothing is done any more.
    """
    setup_logs(int(os.environ["RANK"]))
    folder, local_rank = Path(folder_name), os.environ["LOCAL_RANK"]
    if local_rank == "0":
        (folder / ABSENCE_FILE).unlink(missing_ok=True)  # of an attempt before
    text = (folder / SETTINGS_FILE).read_text(encoding="utf-8")
    try:
        _raise_user_error(folder)
        return _function(stage)(_function(settings_class).model_validate_json(text))
    except AbsentRanksError as error:
        time.sleep(SECONDS_TO_AGREE)  # a rank of this machine that failed is to be seen first: it knows why
        _leave_error(folder / ABSENCE_FILE, error)
        sys.exit(error.exit_code)
    except UserError as error:
        signal.signal(signal.SIGTERM, _leave)  # the launcher may stop this rank before it ends by itself
        _leave_error(folder / ERROR_FILES.format(local_rank), error)
        if _all_have_errors(folder):
            _stop_launcher(launcher)
        sys.exit(error.exit_code)


def _all_have_errors(folder: Path) -> bool:
    """Whether every rank of this machine ends with a UserError, in a few seconds at most."""
    deadline = time.monotonic() + SECONDS_TO_AGREE
    paths = [folder / ERROR_FILES.format(rank) for rank in range(int(os.environ["LOCAL_WORLD_SIZE"]))]
    while not all(path.exists() for path in paths):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _leave(*_: object) -> NoReturn:
    """A handler that ends this process in good order, so that nothing is left to be complained about."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(1)


def _stop_launcher(launcher: int) -> NoReturn:
    """Have local rank 0 stop the launcher, and wait to be stopped by it."""
    if os.environ["LOCAL_RANK"] == "0":
        if os.environ["LOCAL_WORLD_SIZE"] != os.environ["WORLD_SIZE"]:
            time.sleep(SECONDS_FOR_MACHINES)  # machine 0 hosts the meeting point of all
        if os.getppid() == launcher:  # it may have been killed, and this process been given another parent
            os.kill(launcher, signal.SIGTERM)
    deadline = time.monotonic() + SECONDS_TO_BE_STOPPED
    while os.getppid() == launcher and time.monotonic() < deadline:
        time.sleep(0.05)
    sys.exit(1)


def _function(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
