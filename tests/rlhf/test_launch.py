"""The launcher without a network: its plan, what it refuses, and when it starts again. Hosts are local shells, or shell scripts that fail."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlhf.config import load_config
from rlhf.launch.host import exit_code_of, fingerprint, interface_towards, port_is_free
from rlhf.launch.layout import Host, Launch, Ranks, parse_hosts, reach, read_ranks, server_urls, serving_commands
from rlhf.launch.slurm import SRUN, batch_script
from rlhf.launch.supervise import Ended, culprit, describe, faults_of, supervise

ROOT = Path(__file__).parents[2]
RECIPE = "recipes/tiny/grpo.yaml"


def launch(tmp_path, *overrides, **changes):
    overrides = (f"output_dir={tmp_path}/run", *overrides)
    given = dict(
        config=load_config(ROOT / RECIPE, overrides), recipe=RECIPE, overrides=overrides,
        ranks=Ranks(path="ddp.yaml", num_machines=2, num_processes=8, port=29500), hosts=parse_hosts(["a=10.0.0.1", "b"]),
        directory=str(ROOT), python="/usr/bin/python3", ssh="env HOST={host}", port=29500,
    )  # fmt: skip
    return Launch(**{**given, **changes})


# ------------------------------------------------------------------------------------------------------------------------ the plan


def test_a_host_has_a_name_to_reach_it_by_and_an_address_for_the_others():
    hosts = parse_hosts(["node1", "me@node2", "node3=10.0.0.3", "node4=fe80::1"])
    assert hosts == (
        Host("node1", "node1"),
        Host("me@node2", "node2"),
        Host("node3", "10.0.0.3"),
        Host("node4", "fe80::1"),
    )


@pytest.mark.parametrize(
    "text", ["", "-oProxyCommand=evil", "a b", "a;reboot", "$(reboot)", "a=-x", "a=b c", "@a", "a\nb"]
)
def test_text_that_is_no_host_name_never_becomes_part_of_a_command(text):
    with pytest.raises(ValueError, match="is no host"):
        parse_hosts([text])


def test_a_host_named_twice_is_refused():
    with pytest.raises(ValueError, match="--hosts names a twice"):
        parse_hosts(["a", "b", "a"])
    with pytest.raises(ValueError, match="--hosts names 10.0.0.1 twice"):
        parse_hosts(["a=10.0.0.1", "b=10.0.0.1"])


def test_a_template_reaches_a_host_through_one_shell_whatever_program_it_is():
    host, line = Host("h", "h"), "cd '/my dir' && exec x"
    assert reach("ssh -p 22", host, line) == ["ssh", "-p", "22", "h", line]
    assert reach("ip netns exec {host}", host, line) == ["ip", "netns", "exec", "h", "sh", "-c", line]
    assert reach("srun --nodelist={host}", host, line) == ["srun", "--nodelist=h", "sh", "-c", line]
    assert reach("gcloud ssh {host} --command {command}", host, line) == ["gcloud", "ssh", "h", "--command", line]
    for template in ("", "ssh 'x"):
        with pytest.raises(ValueError, match="--ssh is"):
            reach(template, host, line)


def test_what_a_recipe_or_a_path_holds_arrives_as_it_was_written(tmp_path):
    """Through a real shell: quotes, spaces, dollars and line breaks in overrides and variables."""
    folder = tmp_path / "my $HOME 'dir'"
    folder.mkdir()
    awkward = ['chat.system_prompt=say "it\'s" $HOME; rm -rf /\n`x` \\']
    one = launch(tmp_path, directory=str(folder), environment={"GREETING": "two  words '$x'"}, ssh="env")
    show = [
        sys.executable,
        "-c",
        "import os, sys; print([os.getcwd(), os.environ['GREETING'], sys.argv[1:]])",
        *awkward,
    ]
    command = one.on_host(Host("HOST=h", "h"), show)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([str(folder), "two  words '$x'", awkward])


def test_each_host_gets_its_ranks_and_the_first_ones_address_and_port(tmp_path):
    one = launch(tmp_path)
    assert [list(one.ranks_of(i)) for i in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    first, second = one.command(0), one.command(1)
    assert [word for pair in zip(first, second, strict=True) for word in pair if len(set(pair)) == 2] == ["0", "1"]
    for flag, value in (
        ("--machine_rank", "1"),
        ("--num_machines", "2"),
        ("--num_processes", "8"),
        ("--main_process_ip", "10.0.0.1"),
    ):
        assert second[second.index(flag) + 1] == value
    assert second[second.index("scripts/train_grpo.py") :] == [
        "scripts/train_grpo.py", "--config", RECIPE, f"output_dir={tmp_path}/run",
    ]  # fmt: skip


def accelerate_file(tmp_path, **changes):
    settings = yaml.safe_load((ROOT / "recipes/accelerate/multi_node.yaml").read_text())
    for key, value in changes.items():
        where = settings["deepspeed_config"] if key in settings["deepspeed_config"] else settings
        where[key] = value
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(settings))
    return str(tmp_path / "accelerate.yaml")


def test_the_accelerate_file_says_how_many_ranks_a_host_has(tmp_path):
    ranks = read_ranks(accelerate_file(tmp_path), nodes=2)
    assert (ranks.num_processes, ranks.per_host, ranks.port) == (16, 8, 29500)
    ranks = read_ranks(accelerate_file(tmp_path), nodes=4)
    assert (ranks.num_processes, ranks.num_machines, ranks.per_host) == (32, 4, 8)


@pytest.mark.parametrize(
    ("changes", "nodes", "message"),
    [
        ({"num_processes": 15}, 2, "num_processes: 15, which 2 machines cannot share evenly"),
        ({"distributed_type": "MULTI_CPU"}, 2, "one process a host that knows of no other"),
        ({"deepspeed_multinode_launcher": "pdsh"}, 2, "deepspeed_multinode_launcher: pdsh"),
        ({"rdzv_backend": "c10d"}, 2, "write static"),
    ],
)
def test_an_accelerate_file_that_disagrees_is_refused_with_the_line_to_write(tmp_path, changes, nodes, message):
    with pytest.raises(ValueError, match=message):
        read_ranks(accelerate_file(tmp_path, **changes), nodes=nodes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"port": 80}, "--port is 80; give one between 1024 and 65535"),
        ({"directory": "checkout"}, "--directory is 'checkout'; give an absolute path"),
        ({"python": "/a\nb"}, "--python is"),
        ({"environment": {"A B": "1"}}, "--env names 'A B'"),
        ({"config": load_config(ROOT / "recipes/tiny/evaluate.yaml")}, "does not train on several hosts"),
    ],
)
def test_what_cannot_be_launched_is_refused_with_its_key(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        launch(tmp_path, **changes)


def test_serving_hosts_are_refused_while_the_engine_samples_inside_the_ranks(tmp_path):
    config = launch(tmp_path).config
    assert server_urls(config, (), 8400) == []
    with pytest.raises(ValueError, match="--serving-hosts names s, but rollout.engine is auto"):
        server_urls(config, parse_hosts(["s"]), 8400)


def test_serving_hosts_listen_on_their_addresses_and_the_ranks_are_told(tmp_path):
    one = launch(tmp_path)
    hosts = parse_hosts(["s=10.0.0.8", "t=10.0.0.9"])
    assert serving_commands(one, hosts, 8400)[1][3:] == [
        "serve", one.python, "-u", "scripts/serve.py", RECIPE, *one.overrides, "--host", "10.0.0.9", "--port", "8400",
    ]  # fmt: skip
    rollout = one.config.rollout.model_copy(update={"engine": "server"})
    assert server_urls(one.config.model_copy(update={"rollout": rollout}), hosts, 8400) == [
        "rollout.server.urls=[http://10.0.0.8:8400, http://10.0.0.9:8400]"
    ]


# --------------------------------------------------------------------------------------------------------------------------- checks


def test_a_host_knows_its_interface_towards_an_address_and_whether_a_port_is_free():
    assert interface_towards("127.0.0.1") == "lo"
    import socket

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        assert not port_is_free(taken.getsockname()[1])
        free = taken.getsockname()[1]
    assert port_is_free(free)


GOOD = {"same": {"code": "1"}, "interface": "eth0", "shares_output_dir": True, "port_free": True}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"same": {"code": "2"}}, "host b has another code than this one"),
        ({"same": {}}, "host b has another code than this one"),
        ({"port_free": False}, "port 29500 is in use on host b; choose another --port"),
        ({"shares_output_dir": False}, "host b does not see what a writes beside output_dir"),
        ({"interface": "lo"}, "over its loopback; give the address the others see: --hosts a=ADDRESS"),
    ],
)
def test_an_unfit_host_is_named_with_what_is_wrong(tmp_path, change, message):
    one = launch(tmp_path)
    faults = faults_of(one, one.hosts[1], GOOD | change, {"code": "1"})
    assert len(faults) == (message is not None)
    assert message is None or message in faults[0]


def test_a_changed_recipe_override_or_accelerate_file_changes_the_fingerprint(tmp_path):
    file = accelerate_file(tmp_path)
    one = fingerprint(str(ROOT / RECIPE), [], file)
    other = fingerprint(str(ROOT / RECIPE), ["seed=7"], file)
    assert [key for key in one if one[key] != other[key]] == ["recipe"]
    again = fingerprint(str(ROOT / RECIPE), [], accelerate_file(tmp_path, num_processes=8))
    assert [key for key in one if one[key] != again[key]] == ["accelerate configuration"]


# ------------------------------------------------------------------------------------------------------------------ when it restarts


def test_a_hosts_exit_code_tells_a_refusal_from_a_signal_from_a_fault():
    assert exit_code_of([(3, -signal.SIGKILL), (2, -signal.SIGTERM)]) == 137
    assert exit_code_of([(0, 1), (1, 2)]) == 2
    assert exit_code_of([(0, 1), (1, -signal.SIGTERM)]) == 1
    assert (describe(137), describe(255), describe(1)) == (
        "SIGKILL (exit code 137)",
        "exit code 255, a lost connection",
        "exit code 1",
    )


@pytest.mark.parametrize(
    ("codes", "explains"), [((1, 137), 1), ((1, 1), 0), ((137, 2), 1), ((1, 255), 1), ((0, 1), 1), ((1, -9), 1)]
)
def test_the_host_whose_end_explains_the_others_is_blamed(codes, explains):
    ended = [Ended(Host(f"h{i}", ""), code, Path()) for i, code in enumerate(codes)]
    assert culprit(ended).host.name == f"h{explains}"


@pytest.fixture
def supervised(tmp_path, monkeypatch):
    """Runs a supervision whose hosts execute a shell script in the place of Python; `$ATTEMPT` counts from 1."""

    def supervised(script, *, restarts):
        monkeypatch.setattr("rlhf.launch.supervise.SETTLE", 0.5)
        (tmp_path / "run/checkpoints").mkdir(parents=True)
        stub = tmp_path / "python"
        count = f"ATTEMPT=$(ls -d {tmp_path}/logs/attempt-* | wc -l); RUN={tmp_path}/run\n"
        stub.write_text(f"#!/bin/sh\n{count}{script}\n")
        stub.chmod(0o755)
        out = io.StringIO()
        code = supervise(launch(tmp_path, python=str(stub)), restarts=restarts, logs=tmp_path / "logs", out=out)
        return code, out.getvalue(), len(list((tmp_path / "logs").glob("attempt-*")))

    return supervised


def test_a_stage_that_finishes_on_all_hosts_is_finished(supervised):
    code, text, attempts = supervised('echo "hello from $HOST"', restarts=3)
    assert (code, text, attempts) == (0, "hello from a\n", 1)


def test_hosts_are_restarted_as_long_as_checkpoints_appear_and_restarts_are_left(supervised):
    script = 'mkdir -p $RUN/checkpoints/step-00000$ATTEMPT; test "$HOST" = a || { echo "lost $ATTEMPT"; kill -9 $$; }'
    code, text, attempts = supervised(script, restarts=2)
    assert (code, attempts) == (1, 3)
    assert [line for line in text.splitlines() if line.startswith(("restart ", "not restarted"))] == [
        "restart 1 of 2, from checkpoint 1",
        "restart 2 of 2, from checkpoint 2",
        "not restarted: 2 restarts are used up (--restarts); the same command goes on from checkpoint 3",
    ]
    assert text.count("host b ended with SIGKILL (exit code -9); the last lines of ") == 3
    assert "\n  | lost 1\n" in text


def test_a_second_failure_without_a_new_checkpoint_is_the_last(supervised):
    code, text, attempts = supervised('test "$HOST" = a || exit 1', restarts=5)
    assert (code, attempts) == (1, 2)
    assert "restart 1 of 5, from the beginning, there is no checkpoint yet" in text
    assert "not restarted: no new checkpoint since the last restart" in text


def test_a_refused_recipe_is_not_tried_again(supervised):
    code, text, attempts = supervised('test "$HOST" = a || { echo "error: rollout.engine"; exit 2; }; cat', restarts=5)
    assert (code, attempts) == (2, 1)
    assert "error: rollout.engine" in text


def test_a_host_that_waits_for_the_others_is_ended_through_its_standard_input(supervised, tmp_path):
    """As an ssh client does it: what it started runs on until its input ends."""
    script = f'test "$HOST" = b && exit 1; cat > /dev/null; echo ended > {tmp_path}/ended; exit 1'
    code, *_ = supervised(script, restarts=0)
    assert code == 1
    assert (tmp_path / "ended").read_text() == "ended\n"


# ---------------------------------------------------------------------------------------------------------------------------- SLURM


def job(tmp_path, **changes):
    one = launch(tmp_path)
    given = dict(
        launcher=["python", "scripts/launch.py", RECIPE, "chat.system_prompt=it's $HOME"], directory="/my checkout", logs=Path("logs"),
        gpus_per_node=8, serving_nodes=0, options=["--partition=gpu", "--time=24:00:00"],
    )  # fmt: skip
    return batch_script(one.config, one.ranks, **{**given, **changes})


def test_a_slurm_job_asks_for_the_nodes_and_runs_the_launcher_on_them(tmp_path):
    """The script itself is run, with stand-ins for the commands of SLURM that print what they were given."""
    text = job(tmp_path, directory=str(tmp_path))
    for line in (
        "--nodes=2",
        "--ntasks-per-node=1",
        "--exclusive",
        "--gpus-per-node=8",
        "--requeue",
        "--open-mode=append",
        "--partition=gpu",
        "--time=24:00:00",
    ):
        assert f"\n#SBATCH {line}\n" in text
    for name, script in (("scontrol", 'printf "n1\\nn2\\n"'), ("python", 'for a in "$@"; do echo "<$a>"; done')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "31234",
        "SLURM_JOB_NODELIST": "n[1-2]",
    }
    done = subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "<scripts/launch.py>", f"<{RECIPE}>", "<chat.system_prompt=it's $HOME>", "<--ssh>", f"<{SRUN}>", "<--hosts>", "<n1,n2>", "<--port>", "<31234>",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": ["--time 1"]}, "--sbatch is '--time 1'"),
        ({"options": ["--comment=a\nreboot"]}, "--sbatch is"),
        ({"logs": Path("my logs")}, "which an #SBATCH line cannot hold"),
    ],
)
def test_what_sbatch_would_read_as_something_else_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        job(tmp_path, **changes)
