"""Who this process is among its peers: rank, world size, device; joining and leaving the process group.

Two groups join the ranks: the default one (NCCL or gloo) for tensors on the device, and a gloo one for what the hosts
say to each other, so that a word between hosts never waits for a device.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from xar_cli.errors import UserError

Value = TypeVar("Value")


class AbsentRanksError(UserError):
    """Other ranks did not come, or went away; another attempt may go better, where other errors of a person would come
    again.
    """


HOST_TIMEOUT_MINUTES = 60  # rank 0 may write a large checkpoint while the others wait
TIMEOUT_SECONDS = 600.0  # how long ranks wait for each other, at the start and in a collective
LONGEST_WORK = timedelta(days=365)  # that ranks wait for each other at the end: no limit, in effect
LAST_PORT = 65_535
LEFT_OVER = "Where they are left over from another job, unset RANK and WORLD_SIZE."
ELASTIC = "TORCHELASTIC_RUN_ID"  # set by torch's elastic launcher, ours or another's
STORE_POLL_SECONDS = 0.2
STORE_GRACE_SECONDS = 2.0  # a torch client that times out by itself says more
SIOCGIFADDR = 0x8915  # Linux: the address of a network interface


@dataclass(frozen=True)
class Ranks:
    """The place of this process among all processes of the job.

    Attributes:
        rank: number of this process, 0 to world_size - 1.
        local_rank: its number on this machine.
        world_size: processes in all.
        device: where its tensors live.
        hosts: the group for words between hosts; None is the default group.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    hosts: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that logs and writes what is written once."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks; nothing on one rank."""
        if self.world_size > 1:
            dist.barrier(self.hosts)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in place; the tensor itself on one rank."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, value: int) -> int:
        """The largest of the ranks' numbers, on every rank; spoken between hosts, no device waits."""
        if self.world_size == 1:
            return value
        number = torch.tensor(value)
        dist.all_reduce(number, dist.ReduceOp.MAX, self.hosts)
        return int(number)

    def gather(self, value: object) -> list[object]:
        """One picklable value from every rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[object] = [None] * self.world_size
        dist.all_gather_object(values, value, self.hosts)
        return values

    def on_main(self, compute: Callable[[], Value]) -> Value:
        """What `compute` gives on rank 0, on every rank; a UserError raised there is raised everywhere."""
        if self.world_size == 1:
            return compute()
        outcome: list[tuple[Value | None, UserError | None] | None] = [None]
        if self.is_main:
            try:
                outcome = [(compute(), None)]
            except UserError as error:
                outcome = [(None, error)]
        dist.broadcast_object_list(outcome, 0, self.hosts)
        assert outcome[0] is not None
        value, fault = outcome[0]
        if fault is not None:
            raise fault
        return value  # type: ignore[return-value]

    def on_all(self, compute: Callable[[], Value]) -> Value:
        """What `compute` gives on this rank; a UserError of any rank is raised on all, that of the lowest."""
        value: Value | None = None
        fault: UserError | None = None
        try:
            value = compute()
        except UserError as error:
            fault = error
        first = next((found for found in self.gather(fault) if isinstance(found, UserError)), None)
        if first is not None:
            raise first
        return value  # type: ignore[return-value]


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded over the ranks (then every rank must call this)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def assign(target: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded over the ranks (then every rank must call this)."""
    if isinstance(target, DTensor):
        target.copy_(distribute_tensor(whole.to(target.device), target.device_mesh, target.placements))
    else:
        target.copy_(whole)


def rank_and_world(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """Rank and world size of this process by RANK and WORLD_SIZE; None where they are not both there: it is alone.

    Raises:
        UserError: they, or LOCAL_RANK and LOCAL_WORLD_SIZE beside them, make no job, or MASTER_ADDR and MASTER_PORT
            do not say where several ranks meet.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    rank, world_size = environment["RANK"], environment["WORLD_SIZE"]
    if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
        raise UserError(f"RANK={rank} and WORLD_SIZE={world_size} make no job.", LEFT_OVER)
    for name, least in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)):
        value = environment.get(name, str(least))
        if not value.isdecimal() or int(value) < least:
            raise UserError(f"{name}='{value}' beside RANK={rank} is no number of a process.", LEFT_OVER)
    host, port = environment.get("MASTER_ADDR", ""), environment.get("MASTER_PORT", "")
    if int(world_size) > 1 and not (host and port.isdecimal() and 1 <= int(port) <= LAST_PORT):
        raise UserError(
            f"WORLD_SIZE={world_size} ranks meet at MASTER_ADDR and MASTER_PORT, and '{host}:{port}' is no such place.",
            f"Set these two to a host and a free port of it. {LEFT_OVER}",
        )
    return int(rank), int(world_size)


def ranks_of_machine(world_size: int) -> int:
    """Ranks of this machine, of `world_size` in all; all of them where the launcher does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) if world_size > 1 else 1


def cores_here() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_of_rank(world_size: int) -> int:
    """The cores that are this rank's own: Slurm may have given it some; else all ranks of the machine share them."""
    all_here = cores_here() if ELASTIC in os.environ else os.cpu_count() or 1
    return max(1, min(cores_here(), all_here // ranks_of_machine(world_size)))


def pick_device(name: str, local_rank: int = 0, ranks_here: int = 1) -> torch.device:
    """The device called `name`: auto (CUDA where there is one), cpu, cuda or cuda:N.

    Without a number it is that of the local rank, or the only one that Slurm lets this task see. Ranks of torch's
    elastic launcher all see the same devices: there one that is missing is missed.

    Raises:
        UserError: CUDA was asked for and is not there, the name is none of these, or one GPU is named for several
            ranks of a machine (`ranks_here`).
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind != "cuda" or (index and not index.isdecimal()):
        raise UserError(f"There is no device called '{name}'.", "Use auto, cpu, cuda or cuda:N.")
    if index and ranks_here > 1 and _devices_are_shared():
        raise UserError(
            f"'{name}' is one GPU, for {ranks_here} processes of this machine.",
            "Use --device cuda, which gives each its own, and CUDA_VISIBLE_DEVICES to choose among them.",
        )
    number = int(index) if index else local_rank
    of_its_own = torch.cuda.device_count() == 1 and ELASTIC not in os.environ  # srun --gpus-per-task=1
    if not index and of_its_own:
        number = 0
    if not torch.cuda.is_available() or number >= torch.cuda.device_count():
        raise UserError(f"Device 'cuda:{number}' is not here.", "Use --device cpu, or check `nvidia-smi`.")
    return torch.device("cuda", number)


def _devices_are_shared() -> bool:
    """Whether all ranks of this machine are known to see the same devices: those of torch's launcher do, ours too."""
    if ELASTIC in os.environ or rank_and_world(os.environ) is None:
        return True
    return "LOCAL_WORLD_SIZE" in os.environ and torch.cuda.device_count() > 1


@contextmanager
def process_group(device: str = "auto", timeout_seconds: float = TIMEOUT_SECONDS) -> Iterator[Ranks]:
    """Join the job that the environment describes (RANK, WORLD_SIZE, ...), and leave it when the work ends or fails.

    Without them, as `rank_and_world` reads them, it is alone. Backend: NCCL with CUDA devices, gloo otherwise. A rank
    whose work is done waits for the others, however long they take: launchers take one that left for the job's end.

    Args:
        device: as `pick_device` takes it.
        timeout_seconds: how long the ranks wait for each other, at the start and in a collective.

    Raises:
        UserError: the variables make no job, or the device is not here or not for every rank.
        AbsentRanksError: the ranks did not meet in time, the port is taken, or another rank failed at its work.
    """
    joined = rank_and_world(os.environ)
    rank, world_size = joined or (0, 1)
    local_rank = int(os.environ.get("LOCAL_RANK", 0)) if joined else 0
    picked = pick_device(device, local_rank, ranks_of_machine(world_size))
    if picked.type == "cuda":
        torch.cuda.set_device(picked)
    if world_size == 1:
        yield Ranks(rank, local_rank, world_size, picked)
        return
    _use_interface_to(os.environ["MASTER_ADDR"])
    _meet("nccl" if picked.type == "cuda" else "gloo", rank, world_size, timeout_seconds)
    try:
        hosts = dist.new_group(backend="gloo", timeout=timedelta(minutes=HOST_TIMEOUT_MINUTES))
        assert isinstance(hosts, dist.ProcessGroup)
        yield Ranks(rank, local_rank, world_size, picked, hosts)
        _end_together(rank, world_size, hosts)
    finally:
        dist.destroy_process_group()


def _end_together(rank: int, world_size: int, hosts: dist.ProcessGroup) -> None:
    """Wait until every rank has done its work: all tell rank 0, then rank 0 tells all.

    By single messages, since a barrier of gloo has the time limit of its group. A rank that fails closes its
    connections, and so ends the waiting of the others: at the latest when the ranks before it have done their work.
    """

    def send(peers: Iterable[int]) -> None:
        _wait_long([dist.isend(torch.ones(1), peer, hosts) for peer in peers])

    def receive(peers: Iterable[int]) -> None:
        _wait_long([dist.irecv(torch.empty(1), peer, hosts) for peer in peers])

    try:
        with _dying_of_ctrl_c():
            if rank == 0:
                receive(range(1, world_size))
                send(range(1, world_size))
            else:
                send([0])
                receive([0])
    except RuntimeError as error:
        raise AbsentRanksError(
            "This rank has done its work, and another one failed or went away.",
            "See what that one says; the same command goes on from what is there.",
            exit_code=1,
        ) from error


def _wait_long(works: Iterable[dist.Work | None]) -> None:
    for work in works:
        assert work is not None  # as for a rank that is not in the group
        work.wait(LONGEST_WORK)


@contextmanager
def _dying_of_ctrl_c() -> Iterator[None]:
    """Have SIGINT end this process at once, where nobody handles or ignores it.

    Python's own handler would wait for what torch waits for.
    """
    handled = signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    if handled or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _meet(backend: str, rank: int, world_size: int, seconds: float) -> None:
    """Form the default group within the time limit."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    place = f"{host}:{port}"
    try:
        if rank:
            require_store(host, port, seconds)
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timedelta(seconds=seconds))
    except RuntimeError as error:  # of torch's own kinds, but torch 2.6 has none for a port in use
        if port_in_use(error):
            raise AbsentRanksError(
                f"The port of {place} is in use.",
                "Choose another one: --rdzv-endpoint HOST:PORT or MASTER_PORT.",
                exit_code=1,
            ) from None
        if not isinstance(error, dist.DistNetworkError | dist.DistStoreError):
            raise
        raise AbsentRanksError(
            f"The {world_size} ranks did not meet at {place} within {seconds:.0f} seconds.",
            "Check that all ranks were started, name the same address, and that the port is open.",
            exit_code=1,
        ) from error


def require_store(host: str, port: int, seconds: float) -> None:
    """Wait until a torch store answers at this address.

    First until anything listens there. A torch client waits without end for the first word of another program that
    says nothing: so this part is done aside, by a thread that is left behind.

    Raises:
        DistNetworkError: none answers within the time limit.
    """
    deadline = time.monotonic() + seconds
    while not _listens(host, port):
        if time.monotonic() >= deadline:
            raise dist.DistNetworkError(f"nothing listens at {host}:{port}")
        time.sleep(STORE_POLL_SECONDS)
    seconds = max(1.0, deadline - time.monotonic())
    outcome: list[Exception | None] = []

    def connect() -> None:
        try:
            dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=seconds), wait_for_workers=False)
        except Exception as error:  # handed on below
            outcome.append(error)
        else:
            outcome.append(None)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds + STORE_GRACE_SECONDS)
    if not outcome:
        raise dist.DistNetworkError(f"what listens at {host}:{port} does not answer as a rendezvous does")
    if outcome[0] is not None:
        raise outcome[0]


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def port_in_use(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that the port is taken."""
    while error is not None:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False


def local_address(host: str, port: int = 9) -> str:
    """The address of this machine on the network that leads to `host`; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(probe.getsockname()[0])


def _use_interface_to(host: str) -> None:
    """Have gloo use the network interface that leads to `host`, unless GLOO_SOCKET_IFNAME says which.

    Left alone it takes the address that this machine's own name has, which is often the loopback one.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    try:
        import fcntl  # not on Windows

        wanted = local_address(host)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for _, name in socket.if_nameindex():
                try:
                    found = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                except OSError:
                    continue  # an interface without an address
                if socket.inet_ntoa(found[20:24]) == wanted:
                    os.environ["GLOO_SOCKET_IFNAME"] = name
                    return
    except (ImportError, OSError):
        return  # gloo's own choice remains
