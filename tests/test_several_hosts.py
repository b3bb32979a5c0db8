"""The launcher on two hosts: network namespaces joined by a virtual cable, each with interfaces and ports of its own."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from data.records import write_records
from data.stories import prepare
from rlhf.metrics import CLOCK, read_jsonl

ROOT = Path(__file__).parents[1]


def ip(*arguments):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)


@pytest.fixture(scope="module")
def hosts():
    """`name=address` of two namespaces that reach each other and nothing else."""
    names = [f"host{i}-{os.getpid()}" for i in range(2)]
    ends = [f"ve{i}-{os.getpid()}" for i in range(2)]
    addresses = ["10.213.7.1", "10.213.7.2"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for name, end, address in zip(names, ends, addresses, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", end)
            for interface in ("lo", end):
                ip("-n", name, "link", "set", interface, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', None) or error}")
    yield [f"{name}={address}" for name, address in zip(names, addresses, strict=True)]
    for name in names:
        ip("netns", "delete", name)


@pytest.fixture(scope="module")
def configurations(tmp_path_factory):
    """Number of machines → accelerate file of two ranks in all."""
    folder = tmp_path_factory.mktemp("accelerate")
    settings = yaml.safe_load((ROOT / "recipes/accelerate/ddp.yaml").read_text())
    for machines in (1, 2):
        (folder / f"{machines}.yaml").write_text(yaml.safe_dump(settings | {"num_machines": machines}))
    return {machines: folder / f"{machines}.yaml" for machines in (1, 2)}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    prepared = prepare(
        seed=0, min_level=2, max_level=3, answers_at_once=0.0, demonstrations=64, train_problems=64, test_problems=4,
        train_pairs=4, heldout_pairs=2,
    )  # fmt: skip
    write_records(prepared.train_problems, folder / "problems.jsonl")
    write_records(prepared.demonstrations, folder / "demonstrations.jsonl")
    return folder


@pytest.fixture(scope="module")
def start(hosts, configurations, model_folder, records):
    """Starts the tiny GRPO recipe through the launcher on the first `machines` hosts."""

    def start(output_dir, *overrides, machines=2, options=()):
        command = [
            sys.executable, "scripts/launch.py", "recipes/tiny/grpo.yaml", "--hosts", ",".join(hosts[:machines]),
            "--accelerate", configurations[machines], "--ssh", "ip netns exec {host}", "--env", "OMP_NUM_THREADS=1", *options,
            f"output_dir={output_dir}", f"policy.path={model_folder}", f"problems={records}/problems.jsonl",
            f"demonstrations={records}/demonstrations.jsonl", "rewards=[{name: correctness}, {name: length}]",
            "rollout.engine=transformers", "rollout.prompts_per_batch=4", "rollout.samples_per_prompt=4", "rollout.max_prompt_tokens=120",
            "training.num_batches=3", "training.checkpoint_every_steps=1", "training.keep_checkpoints=9", *overrides,
        ]  # fmt: skip
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def finish(process):
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-6000:]
    return output


def outcome(output_dir):
    """Metrics without the clock, and weights."""
    rows = [
        {k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in read_jsonl(output_dir / "metrics.jsonl")
    ]
    return rows, load_file(output_dir / "model.safetensors")


def assert_same(one, other):
    rows, weights = one
    other_rows, other_weights = other
    assert len(rows) == len(other_rows) > 0
    for row, other_row in zip(rows, other_rows, strict=True):
        assert row == pytest.approx(other_row, rel=1e-4, abs=1e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(other_weights[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_hosts_one_of_which_loses_its_rank_end_as_two_ranks_of_one_host_left_alone(start, hosts, tmp_path):
    """The killed rank is named, both hosts go on from the newest checkpoint, and nothing is left running."""
    finish(start(tmp_path / "alone", machines=1))
    run = tmp_path / "run"
    process = start(run)
    while not list(run.glob("checkpoints/step-*")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    ranks = [p for p in psutil.process_iter(["cmdline", "environ"]) if is_rank(p, 1, run)]
    assert len(ranks) == 1
    ranks[0].send_signal(signal.SIGKILL)
    output = finish(process)
    second = hosts[1].partition("=")[0]
    assert re.search(
        rf"host {second} ended with SIGKILL \(exit code 137\); the last lines of .*:\n(  \| .*\n)*  \| rank 1 ended with SIGKILL\n",
        output,
    )
    assert re.search(r"restart 1 of 3, from checkpoint \d\n", output)
    assert "resuming after batch" in output
    assert_same(outcome(tmp_path / "alone"), outcome(run))
    assert not [p for p in psutil.process_iter(["cmdline", "environ"]) if is_rank(p, None, run)]


def is_rank(process, rank, run):
    environment = process.info["environ"] or {}
    of_run = f"output_dir={run}" in (process.info["cmdline"] or ())
    return of_run and "RANK" in environment and rank in (None, int(environment["RANK"]))
