"""Checkpoints are whole or absent, and a damaged one is seen before anything is read from it."""

import json
import os
import re
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from rlhf.checkpoint import best_of, best_whole, checkpoints, fault_of, newest_whole, save_checkpoint

NUMBERS = 1000


def save(folder, step, *, keep=2, keep_best=None, reward=0.0, numbers=NUMBERS):
    def write(temporary):
        save_file({"weights": torch.full((numbers,), float(step))}, temporary / "policy.safetensors")
        (temporary / "state.json").write_text(json.dumps({"step": step, "metrics": {"reward/total": reward}}))
        return [temporary / "policy.safetensors", temporary / "state.json"]

    save_checkpoint(Accelerator(), folder, step=step, write=write, keep=keep, keep_best=keep_best)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda c: flip(c / "policy.safetensors", -1), r"policy.safetensors has SHA-256 \w{12}… and had \w{12}…"),
        (lambda c: flip(c / "policy.safetensors", 3), "policy.safetensors has SHA-256"),
        (lambda c: flip(c / "state.json", 5), "state.json has SHA-256"),
        (lambda c: truncate(c / "policy.safetensors"), "policy.safetensors has 4,079 bytes and had 4,080"),
        (lambda c: (c / "policy.safetensors").unlink(), "policy.safetensors is missing"),
        (lambda c: (c / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda c: truncate(c / "manifest.json"), "manifest.json cannot be read"),
        (lambda c: (c / "manifest.json").write_text("{}"), "manifest.json names no file"),
        (lambda c: [path.unlink() for path in c.iterdir()], "manifest.json is missing"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, capsys, damage, sentence):
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert newest_whole(Accelerator(), tmp_path) == tmp_path / "step-000002"
    damage(tmp_path / "step-000002")
    assert newest_whole(Accelerator(), tmp_path) == tmp_path / "step-000001"
    said = capsys.readouterr().out
    assert said.startswith("checkpoint step-000002 is damaged, ")
    assert "it is now damaged-step-000002 and step-000001 is used" in said
    assert re.search(sentence, said)


def test_a_flipped_bit_in_any_byte_of_a_manifest_is_seen(tmp_path):
    save(tmp_path, 1)
    manifest = tmp_path / "step-000001/manifest.json"
    whole = manifest.read_bytes()
    for place in range(len(whole)):
        content = bytearray(whole)
        content[place] ^= 1
        manifest.write_bytes(content)
        assert fault_of(manifest.parent) is not None, place


def test_a_damaged_checkpoint_does_not_push_a_whole_one_out(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    truncate(tmp_path / "step-000002/policy.safetensors")
    assert newest_whole(Accelerator(), tmp_path) == tmp_path / "step-000001"
    save(tmp_path, 3)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000001", "step-000003"]


def test_when_none_is_whole_the_run_does_not_start_anew_without_being_told(tmp_path):
    save(tmp_path, 1)
    truncate(tmp_path / "step-000001/state.json")
    with pytest.raises(
        ValueError,
        match=r"no checkpoint in .* is whole \(step-000001: state.json has .* bytes and had .*\); delete that folder",
    ):
        newest_whole(Accelerator(), tmp_path)
    assert newest_whole(Accelerator(), tmp_path / "nothing") is None


def test_the_newest_stay_and_the_best(tmp_path):
    for step, reward in ((1, 0.2), (2, 0.9), (3, 0.5), (4, float("nan")), (5, 0.4)):
        save(tmp_path, step, keep_best="reward/total", reward=reward)
    assert names(tmp_path) == ["step-000002", "step-000004", "step-000005"]
    save(tmp_path, 6, keep_best="reward/total", reward=0.9)  # as good, and newer
    assert names(tmp_path) == ["step-000005", "step-000006"]
    assert best_of(checkpoints(tmp_path), "critic/error") is None
    (tmp_path / "step-000006/state.json").write_text("{")
    assert best_whole(Accelerator(), tmp_path, "reward/total") == tmp_path / "step-000005"
    save(tmp_path, 7, keep_best="reward/total", reward=0.1)
    assert names(tmp_path) == ["step-000005", "step-000006", "step-000007"]


def test_what_a_killed_save_or_removal_left_is_cleared_at_the_next_save(tmp_path):
    for leftover in ("writing-000007", "deleting-step-000001"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "state.json").write_text("{}")
    assert checkpoints(tmp_path) == []
    save(tmp_path, 8)
    assert names(tmp_path) == ["step-000008"]


def test_every_file_reaches_the_disk_before_the_checkpoint_has_its_name_and_the_name_after(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd))
    )
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(f"rename to {b.name}"), rename(a, b)))
    save(tmp_path / "checkpoints", 1)
    assert events == [
        tmp_path.name, "policy.safetensors", "state.json", "manifest.json", "writing-000001", "rename to step-000001", "checkpoints"
    ]  # fmt: skip


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system; the test of a limit on file sizes remains")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_one_sentence_and_leaves_the_checkpoints_before_it(small_disk):
    folder = small_disk / "checkpoints"
    save(folder, 1)
    before = {path.name: path.read_bytes() for path in (folder / "step-000001").iterdir()}
    with pytest.raises(
        OSError,
        match=r"checkpoint of step 2 could not be written: .*No space left on device.*make room.*to resume from step-000001",
    ):
        save(folder, 2, numbers=100_000)
    assert names(folder) == ["step-000001"]
    assert {path.name: path.read_bytes() for path in (folder / "step-000001").iterdir()} == before
    assert newest_whole(Accelerator(), folder) == folder / "step-000001"
    save(folder, 3)  # there is room for this one


def test_a_disk_that_fills_up_with_the_last_small_file_is_seen_as_well(small_disk):
    folder = small_disk / "checkpoints"
    save(folder, 1)
    free = shutil.disk_usage(small_disk).free
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (free - 2 * 4096))  # a page for the weights, one for state.json, none for the manifest
    with pytest.raises(OSError, match="could not be written.*No space left"):
        save(folder, 2)
    assert names(folder) == ["step-000001"]


def test_a_write_that_is_cut_off_is_one_sentence(tmp_path):
    save(tmp_path, 1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limit[1]))  # SIGXFSZ is ignored by Python: the write itself fails
    try:
        with pytest.raises(OSError, match=r"checkpoint of step 2 could not be written: .*File too large"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert names(tmp_path) == ["step-000001"]
    assert fault_of(tmp_path / "step-000001") is None
