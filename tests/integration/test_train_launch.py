"""The launcher as a person meets it: torchrun inside, somebody else's torchrun, Slurm, two machines, failures."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.caches import PIXEL_OVERRIDES, make_cache
from tests.distributed.ranks import free_ports
from tests.runs import SMALL, losses
from xar_cli.logs import read_metrics
from xar_cli.run_dir import RunDir

LONGEST = 240  # seconds: a hang; torch's launchers wait for each other for 300


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("cache") / "latents.h5")


def arguments(data, out, *options):
    sets = [part for override in (*PIXEL_OVERRIDES, *SMALL, "model.dropout=0") for part in ("--set", override)]
    return [
        "-m", "xar_cli", "train", "--recipe", "tiny", "--data", str(data), "--out", str(out), "--device", "cpu",
        *sets, *options,
    ]  # fmt: skip


def start(command, **environment):
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    return subprocess.Popen(
        command, env={**clean, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process):
    try:
        out, error = process.communicate(timeout=LONGEST)
    finally:
        process.kill()
    return process.returncode, out, error


@pytest.mark.slow
def test_torchrun_inside_and_somebody_elses_and_slurm(data, tmp_path):
    """Three ways to two ranks, one run."""
    inside = start([sys.executable, *arguments(data, tmp_path / "inside", "--nproc-per-node", "2", "--json")])
    torchrun = start(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
            "--rdzv-endpoint", "localhost:0", *arguments(data, tmp_path / "outer", "--json"),
        ]
    )  # fmt: skip
    (port,) = free_ports(1)
    tasks = [
        start(
            [sys.executable, *arguments(data, tmp_path / "slurm", "--json")],
            SLURM_NTASKS="2", SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), SLURM_STEP_NODELIST="localhost",
            SLURM_JOB_ID="77", MASTER_PORT=str(port),
        )
        for rank in range(2)
    ]  # fmt: skip
    printed = []
    for process in (inside, torchrun, *tasks):
        code, out, error = finish(process)
        assert code == 0, error
        printed.append(out)
    assert json.loads(printed[0])["steps"] == 10
    assert json.loads(printed[1])["steps"] == 10  # one object, though two ranks ran
    assert json.loads(printed[2])["steps"] == 10
    assert printed[3] == ""
    assert losses(tmp_path / "inside") == losses(tmp_path / "outer") == losses(tmp_path / "slurm")


def test_bad_input_and_failures_come_through(data, tmp_path):
    bad = start([sys.executable, *arguments(data, tmp_path / "bad", "--nproc-per-node", "3")])
    alone = start(
        [sys.executable, *arguments(data, tmp_path / "alone", "--rdzv-timeout", "3")],
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_ports(1)[0]),
    )  # fmt: skip
    nobody = start(
        [
            sys.executable, *arguments(data, tmp_path / "nobody", "--nnodes", "2", "--node-rank", "1"),
            "--rdzv-endpoint", f"127.0.0.1:{free_ports(1)[0]}", "--rdzv-timeout", "3",
        ]
    )  # fmt: skip
    code, _, error = finish(bad)
    assert code == 2
    assert "A global batch of 8 cannot be divided over 3 ranks." in error
    assert "Traceback" not in error
    assert not (tmp_path / "bad").exists()
    code, _, error = finish(alone)
    assert code == 1
    assert "The 2 ranks did not meet at 127.0.0.1:" in error
    code, _, error = finish(nobody)
    assert code == 1
    assert "The 2 machines did not meet" in error


@pytest.fixture
def taken_port():
    """A port that another program listens on and never answers."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def test_a_port_in_use_is_a_sentence_on_both_nodes(data, tmp_path, taken_port):
    """Node 0, which would host the meeting, says so at once; node 1 reaches the other program and gives up in time."""
    nodes = [
        start(
            [
                sys.executable, *arguments(data, tmp_path / "run", "--nnodes", "2", "--node-rank", str(number)),
                "--rdzv-endpoint", f"127.0.0.1:{taken_port}", "--rdzv-timeout", "5",
            ]
        )
        for number in range(2)
    ]  # fmt: skip
    (code, _, host), (other_code, _, other) = [finish(node) for node in nodes]
    assert code == other_code == 1
    assert f"error: The port of 127.0.0.1:{taken_port} is in use." in host
    assert f"error: The 2 machines did not meet at 127.0.0.1:{taken_port}" in other
    assert "Traceback" not in host + other
    assert not (tmp_path / "run").exists()


def test_a_master_port_in_use_is_a_sentence(data, tmp_path, taken_port):
    """Under somebody's own launcher or Slurm, rank 0 hosts at MASTER_PORT."""
    alone = start(
        [sys.executable, *arguments(data, tmp_path / "run", "--rdzv-timeout", "5")],
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(taken_port),
    )  # fmt: skip
    code, _, error = finish(alone)
    assert code == 1
    assert f"error: The port of 127.0.0.1:{taken_port} is in use." in error


def test_the_failing_ranks_traceback_is_shown(tmp_path):
    code, _, error = finish(
        start([sys.executable, "-c", FAILING, str(tmp_path)], PYTHONPATH=os.getcwd()),
    )
    assert code == 1, error
    assert "Rank 1 failed" in error
    assert "ZeroDivisionError: integer" in error
    assert "in fail_on_rank_1" in error


def test_a_machine_whose_own_name_leads_nowhere(data, tmp_path):
    """Several ranks of one machine meet all the same: its name is not asked for."""
    given = arguments(data, tmp_path / "run", "--nproc-per-node", "2", "--rdzv-timeout", "20")[2:]
    code, _, error = finish(start([sys.executable, "-c", NAMELESS, *given], PYTHONPATH=os.getcwd()))
    assert code == 0, error


def launched(stage, path, restarts, nproc=2, **settings):
    """A launch of some ranks of a stage in failing.py: exit code, stderr, how often each rank was started."""
    code, _, error = finish(
        start([sys.executable, "-c", RESTARTING, stage, str(path), str(restarts), str(nproc), json.dumps(settings)],
              PYTHONPATH=os.getcwd())
    )  # fmt: skip
    started = path.read_text().split()
    return code, error, {rank: started.count(str(rank)) for rank in range(2)}


RESTARTING = """
import json
import sys
from tests.integration.failing import Attempts
from xar_cli.errors import UserError
from xar_cli.launch import LaunchOptions, run

if __name__ == "__main__":
    stage, path, restarts, nproc, settings = sys.argv[1:]
    options = LaunchOptions(nproc_per_node=int(nproc), max_restarts=int(restarts))
    try:
        run(f"tests.integration.failing:{stage}", Attempts(path=path, **json.loads(settings)), options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
"""


@pytest.mark.parametrize(
    ("ranks", "exit_code", "in_a_group"),
    [
        ([0, 1], 143, True),
        ([1], 2, True),
        pytest.param([0, 1], 2, False, marks=pytest.mark.slow),
        pytest.param([0], 1, False, marks=pytest.mark.slow),
    ],
)
def test_a_user_error_is_not_tried_again(tmp_path, ranks, exit_code, in_a_group):
    """Found by all ranks or by one, whether the others wait for it or not; torch's launcher would wait 300 seconds."""
    code, error, started = launched(
        "end_with_user_error", tmp_path / "a", 3, ranks=ranks, exit_code=exit_code, in_a_group=in_a_group
    )
    assert code == exit_code, error
    assert f"error: Bad input on {len(ranks)} ranks. Mend it." in error
    assert "Traceback" not in error
    assert max(started.values()) == 1  # a rank that starts late finds that nothing is to be done


@pytest.mark.slow
def test_a_fault_is_tried_again(tmp_path):
    code, error, started = launched("fail_once", tmp_path / "a", 1, ranks=[])
    assert code == 0, error
    assert started[1] == 2


MACHINE = """
import json
import sys
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from tests.integration.failing import Work
from xar_cli.errors import UserError
from xar_cli.launch import LaunchOptions, run

if __name__ == "__main__":
    nproc, nnodes, number, endpoint, settings = sys.argv[1:]
    build = LocalElasticAgent.__init__

    def impatient(self, *rest, **named):
        build(self, *rest, **named)
        self._exit_barrier_timeout = 1  # for which torch's agents wait for each other at the end: else 300

    LocalElasticAgent.__init__ = impatient
    options = LaunchOptions(int(nproc), int(nnodes), int(number), endpoint)
    try:
        print(json.dumps(run("tests.integration.failing:work", Work(**json.loads(settings)), options)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
"""


def launched_apart(**settings):
    """Two machines, both of them here, of one rank each, with an impatient launcher: exit code, stdout and stderr."""
    endpoint = f"127.0.0.1:{free_ports(1)[0]}"
    both = [
        start([sys.executable, "-c", MACHINE, "1", "2", str(number), endpoint, json.dumps(settings)],
              PYTHONPATH=os.getcwd())
        for number in range(2)
    ]  # fmt: skip
    return [finish(process) for process in both]


def test_a_machine_may_work_longer_than_torchs_launchers_wait():
    ended = launched_apart(seconds=6)
    for code, _, error in ended:
        assert code == 0, error
        assert "Traceback" not in error
    assert sorted(json.loads(out)["rank"] for _, out, _ in ended) == [0, 1]


@pytest.mark.parametrize("error", ["fault", pytest.param("user", marks=pytest.mark.slow)])
def test_a_machine_that_fails_ends_the_one_that_waits_for_it(error):
    ended = launched_apart(seconds=3, error=error)
    assert all(code in (1, 2) for code, _, _ in ended), ended
    said = [error for _, _, error in ended]
    assert sum("went away" in text for text in said) == 1, said
    assert sum(("ZeroDivisionError" if error == "fault" else "Bad input on one rank.") in text for text in said) == 1


def test_the_traceback_is_shown_also_of_a_rank_that_takes_its_time_to_end():
    """The rank that waits for it gives up sooner, with a sentence that says less."""
    settings = json.dumps({"seconds": 0, "error": "fault", "seconds_to_end": 6})
    code, _, error = finish(start([sys.executable, "-c", MACHINE, "2", "1", "0", "", settings], PYTHONPATH=os.getcwd()))
    assert code == 1
    assert "Rank 1 of this machine failed:" in error
    assert "ZeroDivisionError" in error


def test_ctrl_c_ends_a_rank_that_waits_for_the_others(tmp_path):
    """In torch's hands it would not hear of it."""
    (port,), done = free_ports(1), tmp_path / "done"
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": os.getcwd()}
    both = [start([sys.executable, "-c", WAITING, str(done)], **job, RANK=str(rank)) for rank in range(2)]
    try:
        while not done.exists():
            assert both[0].poll() is None, both[0].communicate()[1]
            time.sleep(0.1)
        time.sleep(1)  # until it waits; should this be too short, Python hears of it
        both[0].send_signal(signal.SIGINT)
        both[0].communicate(timeout=LONGEST)
        assert both[1].poll() is None
    finally:
        for process in both:
            process.kill()
            process.communicate()


WAITING = """
import pathlib
import sys
import time
from xar_cli.distributed import process_group

with process_group("cpu") as ranks:
    if not ranks.is_main:
        time.sleep(600)
    pathlib.Path(sys.argv[1]).touch()
"""


def test_a_launch_leaves_nothing_in_the_folder_for_temporary_files(tmp_path):
    code, _, error = finish(
        start([sys.executable, "-c", MACHINE, "2", "1", "0", "", json.dumps({"seconds": 0})],
              PYTHONPATH=os.getcwd(), TMPDIR=str(tmp_path))
    )  # fmt: skip
    assert code == 0, error
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_waits_at_the_end_leaves_the_word_to_the_one_that_failed():
    code, _, error = finish(
        start([sys.executable, "-c", MACHINE, "2", "1", "0", "", json.dumps({"seconds": 2, "error": "fault"})],
              PYTHONPATH=os.getcwd())
    )  # fmt: skip
    assert code == 1
    assert "Rank 1 failed" in error
    assert "ZeroDivisionError" in error


def test_one_process_is_started_again_too(tmp_path):
    code, error, started = launched("fail_once", tmp_path / "a", 1, nproc=1, ranks=[])
    assert (code, started[0]) == (0, 2), error


NAMELESS = """
import socket
from xar_cli.cli.app import main

if __name__ == "__main__":
    socket.getfqdn = lambda *_: "no-such-host.invalid"
    main()
"""

FAILING = """
from tests.integration.failing import Nothing
from xar_cli.launch import LaunchOptions, run

if __name__ == "__main__":
    run("tests.integration.failing:fail_on_rank_1", Nothing(), LaunchOptions(nproc_per_node=2))
"""


def two_machines():
    """Two network namespaces joined by a cable; skips where that is not possible."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and the `ip` program")
    tag = f"xar{os.getpid() % 10000}"
    names = [f"{tag}a", f"{tag}b"]
    commands = [
        *(f"ip netns add {name}" for name in names),
        f"ip link add {names[0]} netns {names[0]} type veth peer name {names[1]} netns {names[1]}",
        *(f"ip -n {name} addr add 10.77.0.{i + 1}/24 dev {name}" for i, name in enumerate(names)),
        *(f"ip -n {name} link set {device} up" for name in names for device in (name, "lo")),
    ]
    for command in commands:
        if subprocess.run(command.split(), capture_output=True).returncode:
            remove(names)
            pytest.skip(f"network namespaces are not possible here: `{command}` fails")
    return names


def remove(names):
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture
def machines():
    names = two_machines()
    yield names
    remove(names)


def on_machine(machines, number, data, out, *options):
    (port,) = (29400,)  # its own network: no other program can have it
    return start(
        [
            "ip", "netns", "exec", machines[number], sys.executable,
            *arguments(data, out, "--nnodes", "2", "--node-rank", str(number)),
            "--rdzv-endpoint", f"10.77.0.1:{port}", *options,
        ]
    )  # fmt: skip


@pytest.mark.slow
def test_two_machines_are_one_run(machines, data, tmp_path):
    both = [on_machine(machines, number, data, tmp_path / "run") for number in range(2)]
    for process in both:
        code, _, error = finish(process)
        assert code == 0, error
    alone = start([sys.executable, *arguments(data, tmp_path / "alone")])
    assert finish(alone)[0] == 0
    assert list(losses(tmp_path / "run").values()) == pytest.approx(list(losses(tmp_path / "alone").values()), rel=1e-5)


@pytest.mark.slow
def test_a_machine_that_dies_and_returns(machines, data, tmp_path):
    """Machine 1 loses everything at once; machine 0 waits for it, and the run goes on from the newest checkpoint."""
    longer = ("--set", "train.epochs=40", "--max-restarts", "3")
    out = tmp_path / "run"
    first = on_machine(machines, 0, data, out, *longer)
    second = on_machine(machines, 1, data, out, *longer)
    deadline = time.monotonic() + 200
    while max([record["step"] for record in read_metrics(RunDir(out).metrics)], default=0) < 30:
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.1)
    inside = subprocess.run(["ip", "netns", "pids", machines[1]], capture_output=True, text=True).stdout.split()
    for pid in inside:
        os.kill(int(pid), 9)
    second.wait()
    returned = on_machine(machines, 1, data, out, *longer)
    for process in (returned, first):
        code, _, error = finish(process)
        assert code == 0, error
    assert sorted(losses(out)) == list(range(1, 186))
