"""How a server is started and kept up, with programs in its place that die at once."""

import socket
import subprocess
import sys
import time
from itertools import pairwise

import psutil
import pytest
from online_helpers import config

from rlhf.config import to_yaml
from rlhf.rollout.serving import cores_of, require_free_port, serve_command, serve_environment
from rlhf.run import RECIPE, check_output_dir

NOWHERE = "http://127.0.0.1:1"
KEEPER = "import sys; from rlhf.rollout.serving import keep_up; sys.exit(keep_up(sys.argv[2:], None, url=sys.argv[1], parent=None))"


def test_the_server_gets_the_recipes_weights_lengths_and_parallelism():
    recipe = config(
        "rollout.engine=server", "rollout.server={tensor_parallel: 2, weights: nccl}", "policy.revision=abc", "rollout.dtype=bfloat16"
    )  # fmt: skip
    command = serve_command(recipe, host="10.0.0.5", port=8401)
    options = dict(pairwise(command))
    assert options["--host"] == "10.0.0.5"
    assert options["--port"] == "8401"
    assert options["--model"] == recipe.policy.path
    assert options["--revision"] == "abc"
    assert options["--dtype"] == "bfloat16"
    assert options["--max-model-len"] == "111"  # 100 + 10 and one to score
    assert options["--tensor-parallel-size"] == "2"
    assert "nccl" in options["--weight-transfer-config"]
    assert options["--logprobs-mode"] == "processed_logprobs"  # at the sampling temperature


def test_a_server_on_some_cores_has_a_thread_for_each_and_nothing_of_the_ranks(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    recipe = config("rollout.engine=server", "rollout.server={}")
    environment = serve_environment(recipe, devices="0-1")
    assert environment["OMP_NUM_THREADS"] == "2"
    assert "RANK" not in environment
    assert "TORCHELASTIC_RUN_ID" not in environment


def test_cores_are_read_as_the_kernel_writes_them():
    assert cores_of("0") == {0}
    assert cores_of("0-1") == cores_of("1,0") == {0, 1}
    for wrong in ("", "a", "1-", "0-99999", "1-0"):
        with pytest.raises(ValueError, match=r"rollout.server.devices has"):
            cores_of(wrong)


def test_a_port_in_use_is_named_with_the_key_to_change():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port} of 127.0.0.1 cannot be used.*rollout.server.first_port"):
            require_free_port("127.0.0.1", port)


def test_a_server_that_cannot_be_started_is_given_up_after_four_times():
    kept = subprocess.run([sys.executable, "-c", KEEPER, NOWHERE, "false"], capture_output=True, text=True, timeout=60)
    assert kept.returncode == 1
    assert kept.stdout.count("the server ended with code 1; it is started again") == 4


def test_a_server_that_others_kill_is_started_again_each_time(tmp_path):
    """SIGKILL six times, then it ends by itself."""
    count = tmp_path / "count"
    kill_itself = f"import os, pathlib, sys; c = pathlib.Path({str(count)!r}); n = len(c.read_text()) if c.exists() else 0; c.write_text('x' * (n + 1)); os.kill(os.getpid(), 9) if n < 6 else sys.exit(1)"
    kept = subprocess.run(
        [sys.executable, "-c", KEEPER, NOWHERE, sys.executable, "-c", kill_itself],
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert kept.stdout.count("ended with code -9") == 6
    assert kept.stdout.count("ended with code 1") == 4


def test_what_a_dead_server_leaves_behind_is_ended_before_it_is_started_again():
    leave_a_child = "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True)"
    kept = subprocess.run(
        [sys.executable, "-c", KEEPER, NOWHERE, sys.executable, "-c", leave_a_child],
        capture_output=True,
        text=True,
        timeout=60,
    )
    left = [int(line) for line in kept.stdout.splitlines() if line.isdecimal()]
    assert len(left) == 4
    assert not [pid for pid in left if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


SILENT = """
import http.server, sys, time
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Health)
server.timeout = 10
server.handle_request()
server.server_close()
time.sleep(600)
"""
"""Answers once, then neither answers nor ends, as vLLM's server does whose engine was killed while a client stays connected."""


def test_a_server_that_answered_and_fell_silent_is_ended_and_started_again(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    keeper = KEEPER.replace("parent=None", "parent=None, silent_seconds=1.5")
    command = [sys.executable, "-c", keeper, f"http://127.0.0.1:{port}", sys.executable, "-c", SILENT, str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as kept:
        assert kept.stdout is not None
        lines = [kept.stdout.readline() for _ in range(2)]
        kept.terminate()
    assert lines == ["the server fell silent; it is started again\n"] * 2


def test_a_server_ends_with_the_process_that_wanted_it_even_when_that_is_killed(tmp_path):
    keeper = "import os; from rlhf.rollout.serving import keep_up; keep_up(['sleep', '600'], None, url='http://127.0.0.1:1', parent={})"
    wanting = "import subprocess, sys, os, time; subprocess.Popen([sys.executable, '-c', sys.argv[1].format(os.getpid())]); time.sleep(600)"
    process = psutil.Popen([sys.executable, "-c", wanting, keeper])
    deadline = time.monotonic() + 30
    while not (found := [p for p in process.children(recursive=True) if p.name() == "sleep"]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    psutil.wait_procs(found, timeout=20)
    assert not found[0].is_running() or found[0].status() == psutil.STATUS_ZOMBIE


def test_a_run_goes_on_with_servers_elsewhere_but_not_with_other_settings(tmp_path):
    def recipe(server):
        return config("rollout.engine=server", f"rollout.server={server}", f"output_dir={tmp_path}", "training.max_staleness=1", "algorithm.sampler_correction=mask")  # fmt: skip

    (tmp_path / RECIPE).write_text(to_yaml(recipe("{urls: ['http://a:8400'], patience_seconds: 5}")))
    check_output_dir(recipe("{urls: ['http://b:8400', 'http://c:1']}"))
    check_output_dir(recipe("{replicas: 2, devices: ['0', '1']}"))
    with pytest.raises(
        ValueError, match=r"another run \(rollout.server.update_in_flight is False there and True here\)"
    ):
        check_output_dir(recipe("{update_in_flight: true}"))
