"""Several training jobs, one after another, in the same few processes: starting a process costs more than a job.

As a program it is one rank: `python -m tests.distributed.ranks JOBS.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


class Said(dict):
    """What the ranks said of each job; a test that asks for one that torch 2.6 cannot do is skipped."""

    def __getitem__(self, name):
        sentences = super().__getitem__(name)
        if version("torch").startswith("2.6.") and "needs a newer torch" in sentences[0]:
            pytest.skip(sentences[0])
        return sentences


def run_jobs(jobs: dict[str, dict], folder: Path, world_size: int = 2, timeout: float = 600) -> dict[str, list[str]]:
    """Run jobs in `world_size` processes; what every rank says of each: "done", or the sentence it ended with.

    A job is the settings of a run (as `TrainSettings` takes them, config as the overrides of `small_recipe`), and
    maybe `fail_at`, a step at which all ranks raise, `rank_overrides`, more overrides for a rank, `rank_data`, another
    cache for a rank, `rank_more`, other settings for a rank, `machine_each`, where each counts as on a machine of its
    own, and of ranks whose memory is probed `rank_holds`, the largest batch, and `rank_uses`, the share of the machine
    that each of the first two images of a batch takes, as if more of them took nothing. With `digests`, a folder, every
    rank writes there a line for each step: a digest of what it holds of weights and optimizer state.
    """
    ports = free_ports(len(jobs))
    numbered = {name: {**job, "port": port} for (name, job), port in zip(jobs.items(), ports, strict=True)}
    path = folder / "jobs.json"
    path.write_text(json.dumps(numbered, default=str))
    processes = []
    for rank in range(world_size):
        environment = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        command = [sys.executable, "-m", "tests.distributed.ranks", str(path)]
        processes.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
    said = [json.loads((folder / f"said-{rank}.json").read_text()) for rank in range(world_size)]
    return Said({name: [of_rank[name] for of_rank in said] for name in jobs})


def _digest(state) -> str:
    """Of what this rank holds of the weights and of the optimizer's state."""
    from xar_cli.train.parallel import local_part

    digest = hashlib.sha256()
    for parameter in state.model.parameters():
        kept = state.optimizer.state[parameter]
        for tensor in (parameter, kept["exp_avg"], kept["exp_avg_sq"], kept["step"]):
            digest.update(local_part(tensor.detach()).numpy().tobytes())
    return digest.hexdigest()


def _main(path: Path) -> None:
    import torch

    from tests.runs import settings, small_recipe
    from xar_cli.errors import UserError
    from xar_cli.logs import setup_logs
    from xar_cli.train import loop, probe
    from xar_cli.train import step as step_module
    from xar_cli.train.cost import device_bytes

    torch.set_num_threads(1)
    rank, said = int(os.environ["RANK"]), {}
    setup_logs(rank)
    take_step, batch_loss, peak_bytes, last = loop.take_step, step_module.batch_loss, probe.peak_bytes, [0]
    for name, job in json.loads(path.read_text()).items():
        os.environ["MASTER_PORT"] = str(job["port"])
        os.environ["LOCAL_RANK"] = "0" if job.get("machine_each") else str(rank)
        overrides = [*job.get("overrides", []), *job.get("rank_overrides", {}).get(str(rank), [])]

        fail_at = job.get("fail_at")

        digests = job.get("digests")

        def step(state, *rest, fail_at=fail_at, digests=digests):
            if state.step == fail_at:
                raise UserError("Failed as asked.", "")
            take_step(state, *rest)
            if digests:
                with (Path(digests) / f"rank-{rank}").open("a") as file:
                    file.write(_digest(state) + "\n")

        holds = job.get("rank_holds", {}).get(str(rank))

        uses = job.get("rank_uses", {}).get(str(rank))

        def used(device, uses=uses):
            return uses * min(last[-1], 2) * device_bytes(device) if uses else peak_bytes(device)

        def loss(model, config, grouping, moments, *rest, holds=holds):
            last[-1] = moments.shape[0]
            if holds is not None and moments.shape[0] > holds:
                raise torch.cuda.OutOfMemoryError("out of memory")
            return batch_loss(model, config, grouping, moments, *rest)

        loop.take_step, step_module.batch_loss, probe.peak_bytes = step, loss, used
        loop.PROBED_DEVICES = ("cuda",) if holds is None else ("cpu",)
        data = job.get("rank_data", {}).get(str(rank), job["data"])
        try:
            more = {**job.get("more", {}), **job.get("rank_more", {}).get(str(rank), {})}
            loop.train(settings(small_recipe(*overrides), Path(data), Path(job["out"]), **more))
            said[name] = "done"
        except UserError as error:
            said[name] = str(error)
    (path.parent / f"said-{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
