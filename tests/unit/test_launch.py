import pytest

from xar_cli import launch
from xar_cli.config.schema import Section
from xar_cli.errors import UserError
from xar_cli.launch import LaunchOptions, first_host, join_job


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
    assert 20000 <= int(environment["MASTER_PORT"]) < 40000


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
    environment = slurm(RANK="3", WORLD_SIZE="4")
    assert join_job(environment)
    assert environment["RANK"] == "3"


@pytest.mark.parametrize(("code", "shown"), [(-9, 137), (-15, 143), (2, 2), (1, 1), (0, 1)])
def test_exit_codes_are_those_of_a_shell(code, shown):
    assert launch.exit_code(code) == shown


def test_the_traceback_is_taken_out_of_the_launchers_record():
    message = {"message": "short", "extraInfo": {"py_callstack": "Traceback ...\nZeroDivisionError\n"}}
    assert launch._traceback(message) == "Traceback ...\nZeroDivisionError"
    assert launch._traceback("Signal 9 received") == "Signal 9 received"
