import pytest
import torch

from xar_cli import distributed, launch
from xar_cli.config.schema import Section
from xar_cli.distributed import cores_of_rank, pick_device, process_group
from xar_cli.errors import UserError
from xar_cli.launch import LaunchOptions, Place, find_place, first_host, join_job


class Message(Section):
    """Settings of a stage for tests."""

    text: str


def shout(settings: Message) -> dict[str, str]:
    return {"text": settings.text.upper()}


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (LaunchOptions(nproc_per_node=0), "makes no job"),
        (LaunchOptions(nnodes=2, node_rank=2, rdzv_endpoint="host:1"), "makes no job"),
        (LaunchOptions(nnodes=2), "need a place to meet"),
        (LaunchOptions(nnodes=2, rdzv_endpoint="host"), "need a place to meet"),
        (LaunchOptions(nnodes=2, rdzv_endpoint="host:port"), "need a place to meet"),
        (LaunchOptions(nnodes=2, rdzv_endpoint="host:99999"), "need a place to meet"),
        (LaunchOptions(nnodes=2, rdzv_endpoint="host:0"), "need a place to meet"),
        (LaunchOptions(nnodes=2, rdzv_endpoint="host:²"), "need a place to meet"),
        (LaunchOptions(rdzv_endpoint="host:29500"), "this is a job of one"),  # a forgotten --nnodes
        (LaunchOptions(max_restarts=-1), "no number of restarts"),
    ],
)
def test_impossible_jobs(options, fault):
    with pytest.raises(UserError, match=fault):
        options.check()


def test_world_size():
    options = LaunchOptions(8, 4, 3, "gpu01:29500")
    options.check()
    assert options.world_size == 32


def test_one_process_runs_here(monkeypatch):
    monkeypatch.setattr(launch, "join_job", lambda _: False)
    assert launch.run("tests.unit.test_launch:shout", Message(text="hi"), LaunchOptions()) == {"text": "HI"}


def test_a_mistyped_host_is_told_before_any_waiting(monkeypatch):
    for name in ("OMP_NUM_THREADS", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):  # the launcher sets them
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(launch, "join_job", lambda _: False)
    monkeypatch.setattr(launch, "require_store", lambda *_: pytest.fail("waits for a host that is not there"))
    options = LaunchOptions(nnodes=2, node_rank=1, rdzv_endpoint="mistyped.invalid:29500")
    with pytest.raises(UserError, match=r"There is no way from here to mistyped\.invalid:29500"):
        launch.run("tests.unit.test_launch:shout", Message(text="hi"), options)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("gpu[07-09,12],cpu1", "gpu07"),
        ("gpu12", "gpu12"),
        ("a1,b[1-2]", "a1"),
        ("node-[003-004]", "node-003"),
        ("rack1-gpu[2,4-5]", "rack1-gpu2"),
    ],
)
def test_first_host_of_a_node_list(nodelist, host):
    assert first_host(nodelist) == host


MEETING = {"MASTER_ADDR": "gpu01", "MASTER_PORT": "29500"}


def slurm(**changes):
    environment = {
        "SLURM_NTASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "123456",
    }  # fmt: skip
    return {**environment, **changes}


def test_a_task_of_srun_joins_as_the_rank_it_is():
    environment = slurm()
    assert join_job(environment)
    assert environment["RANK"] == "9"
    assert environment["WORLD_SIZE"] == "16"
    assert environment["LOCAL_RANK"] == "1"
    assert environment["MASTER_ADDR"] == "gpu07"
    assert 20000 <= int(environment["MASTER_PORT"]) < 32000


def test_steps_of_one_job_meet_at_ports_of_their_own():
    ports = []
    for step in range(8):
        environment = slurm(SLURM_STEP_ID=str(step))
        assert join_job(environment)
        ports.append(environment["MASTER_PORT"])
    assert len(set(ports)) == 8


def test_a_shell_inside_an_allocation_is_one_process():
    """It is a step of one task, and keeps the number of tasks of the allocation."""
    assert not join_job(slurm(SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0", SLURM_LOCALID="0"))
    step = slurm(SLURM_STEP_NUM_TASKS="10")
    assert join_job(step)
    assert step["WORLD_SIZE"] == "10"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SLURM_TASKS_PER_NODE": "8(x2)"}, "8"),
        ({"SLURM_TASKS_PER_NODE": "3,4(x2)"}, "4"),
        ({"SLURM_TASKS_PER_NODE": "12", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3"}, "4"),  # of the step, not of the job
        ({}, None),
    ],
)
def test_a_task_of_srun_knows_the_ranks_of_its_machine(variables, expected):
    environment = slurm(**variables)
    assert join_job(environment)
    assert environment.get("LOCAL_WORLD_SIZE") == expected


def test_an_address_given_by_hand_is_kept():
    environment = slurm(MASTER_ADDR="10.0.0.1", MASTER_PORT="1234")
    assert join_job(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "1234")


def test_a_batch_script_without_srun_is_one_process():
    environment = slurm()
    del environment["SLURM_STEP_NODELIST"]
    assert not join_job(environment)
    assert not join_job({})
    assert not join_job(slurm(SLURM_NTASKS="1"))


def test_torchrun_comes_before_slurm():
    environment = slurm(**MEETING, RANK="3", WORLD_SIZE="4")
    assert join_job(environment)
    assert environment["RANK"] == "3"


@pytest.mark.parametrize("alone", [{"RANK": "1"}, {"WORLD_SIZE": "2"}, {"RANK": "1", "LOCAL_RANK": "1"}])
def test_rank_or_world_size_by_itself_counts_for_nothing(monkeypatch, alone):
    """For the launch and for the stage in it."""
    assert find_place(LaunchOptions(), dict(alone)) == Place(0, 1, 1, False)
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    with process_group("cpu") as ranks:
        assert (ranks.rank, ranks.local_rank, ranks.world_size) == (0, 0, 1)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"RANK": "2"}, "RANK=2 and WORLD_SIZE=2 make no job"),
        ({"RANK": "-1"}, "RANK=-1 and WORLD_SIZE=2 make no job"),
        ({"WORLD_SIZE": "two"}, "RANK=1 and WORLD_SIZE=two make no job"),
        ({"MASTER_ADDR": ""}, "':29500' is no such place"),
        ({"MASTER_PORT": ""}, "'gpu01:' is no such place"),
        ({"MASTER_PORT": "99999"}, "'gpu01:99999' is no such place"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK='' beside RANK=1"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE='0' beside RANK=1"),
    ],
)
def test_variables_that_make_no_job_are_a_sentence(monkeypatch, changes, fault):
    environment = {"RANK": "1", "WORLD_SIZE": "2", **MEETING, **changes}
    with pytest.raises(UserError, match=fault):
        find_place(LaunchOptions(), environment)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=fault), process_group("cpu"):
        pass


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_says_where_it_waits(monkeypatch, capsys, rank):
    """A process that takes itself for one of many would otherwise wait in silence."""
    for name, value in {"RANK": str(rank), "WORLD_SIZE": "2", **MEETING}.items():
        monkeypatch.setenv(name, value)
    launch.run("tests.unit.test_launch:shout", Message(text="hi"), LaunchOptions())
    assert capsys.readouterr().err == ("" if rank else "Joining as rank 0 of 2 at gpu01:29500.\n")


SLURM_8 = slurm(SLURM_TASKS_PER_NODE="8(x2)", SLURM_NODEID="1")
SLURM_1 = slurm(SLURM_TASKS_PER_NODE="1(x16)", SLURM_LOCALID="0", SLURM_NODEID="9")
TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2", "GROUP_RANK": "1", **MEETING,
}  # fmt: skip
JOB = {"RANK": "3", "WORLD_SIZE": "4", **MEETING}
LEFT_OVER = {"RANK": "0", "WORLD_SIZE": "1"}


@pytest.mark.parametrize(
    ("environment", "options", "place"),
    [
        (SLURM_8, LaunchOptions(), Place(9, 16, 8, True)),
        (SLURM_8, LaunchOptions(nproc_per_node=8), Place(9, 16, 8, True)),
        (SLURM_8, LaunchOptions(8, 2, 1), Place(9, 16, 8, True)),
        (TORCHRUN, LaunchOptions(4, 2, 1, "gpu01:29500"), Place(5, 8, 4, True)),
        (LEFT_OVER, LaunchOptions(), Place(0, 1, 1, True)),
        (JOB, LaunchOptions(nproc_per_node=4), Place(3, 4, 1, True)),
        ({}, LaunchOptions(8, 4, 3, "gpu01:29500"), Place(0, 32, 8, False)),
    ],
)
def test_flags_that_agree_with_the_job(environment, options, place):
    assert find_place(options, dict(environment)) == place


@pytest.mark.parametrize(
    ("environment", "options", "job", "flags"),
    [
        (SLURM_1, LaunchOptions(8, 16), "rank 9 of 16, 1 on a machine, by srun", "--nproc-per-node 8 contradicts"),
        (SLURM_8, LaunchOptions(4, 4), "by srun", "--nproc-per-node 4 and --nnodes 4 contradict "),
        (SLURM_8, LaunchOptions(8, 2, 3), "by srun", "--node-rank 3 contradicts"),
        (SLURM_8, LaunchOptions(max_restarts=2), "by srun", "--max-restarts 2 contradicts"),
        (SLURM_8, LaunchOptions(rdzv_endpoint="a:1"), "by srun", "--rdzv-endpoint a:1 contradicts"),
        (TORCHRUN, LaunchOptions(nproc_per_node=8), "rank 5 of 8, 4 on a machine, by RANK", "--nproc-per-node 8 "),
        (TORCHRUN, LaunchOptions(nnodes=4), "by RANK and WORLD_SIZE", "--nnodes 4 contradicts"),
        (LEFT_OVER, LaunchOptions(nproc_per_node=8), "rank 0 of 1, by RANK", "--nproc-per-node 8 contradicts"),
    ],
)
def test_flags_that_contradict_the_job_are_refused(environment, options, job, flags):
    with pytest.raises(UserError, match="Leave such flags out") as caught:
        find_place(options, dict(environment))
    assert job in caught.value.message
    assert flags in caught.value.message
    assert ("srun" in caught.value.next_step) == ("by srun" in job)


def test_a_stage_is_not_run_where_flags_contradict_the_job(monkeypatch):
    for name, value in LEFT_OVER.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--nproc-per-node 2 contradicts"):
        launch.run("tests.unit.test_launch:shout", Message(text="hi"), LaunchOptions(nproc_per_node=2))


@pytest.mark.parametrize(
    ("devices", "local_rank", "elastic", "picked"),
    [(1, 3, False, "cuda:0"), (8, 3, False, "cuda:3"), (8, 3, True, "cuda:3"), (1, 3, True, None), (2, 3, False, None)],
)
def test_device_of_a_rank(monkeypatch, devices, local_rank, elastic, picked):
    """A task of Slurm may see one device, its own; where ranks see the same devices, none is taken twice."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if elastic:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "xar")
    if picked:
        assert pick_device("auto", local_rank) == torch.device(picked)
        return
    with pytest.raises(UserError, match="'cuda:3' is not here"):
        pick_device("cuda", local_rank)


@pytest.mark.parametrize("name", ["cuda:²", "cuda:x", "gpu"])
def test_a_device_that_does_not_exist_is_a_sentence(name):
    with pytest.raises(UserError, match="There is no device called"):
        pick_device(name)


def test_one_gpu_is_not_for_several_ranks_of_a_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", **MEETING}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="'cuda:1' is one GPU, for 2 processes"), process_group("cuda:1"):
        pass
    assert pick_device("cuda:1", ranks_here=1) == torch.device("cuda:1")  # one process on each of several machines
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # srun --gpus-per-task=1: each task sees its own
    assert pick_device("cuda:0", ranks_here=2) == torch.device("cuda:0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(UserError, match="'cuda:0' is one GPU"):
        pick_device("cuda:0", ranks_here=2)


@pytest.mark.parametrize(
    ("world_size", "variables", "cores", "expected"),
    [
        (1, {}, 6, 6),
        (4, {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}, 6, 3),  # that both share
        (4, {"LOCAL_WORLD_SIZE": "2"}, 6, 6),  # its own, by Slurm
        (4, {"LOCAL_WORLD_SIZE": "2"}, 64, 32),
        (4, {}, 64, 16),
        (128, {"LOCAL_WORLD_SIZE": "128"}, 64, 1),
    ],
)
def test_cores_of_a_rank(monkeypatch, world_size, variables, cores, expected):
    """On a machine of 64 cores, of which this process may use some."""
    for name in ("LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(distributed.os, "sched_getaffinity", lambda _: set(range(cores)))
    assert cores_of_rank(world_size) == expected


@pytest.mark.parametrize(("code", "shown"), [(-9, 137), (-15, 143), (2, 2), (1, 1), (0, 1)])
def test_exit_codes_are_those_of_a_shell(code, shown):
    assert launch.exit_code(code) == shown


def test_the_traceback_is_taken_out_of_the_launchers_record():
    message = {"message": "short", "extraInfo": {"py_callstack": "Traceback ...\nZeroDivisionError\n"}}
    assert launch._traceback(message) == "Traceback ...\nZeroDivisionError"
    assert launch._traceback("Signal 9 received") == "Signal 9 received"
