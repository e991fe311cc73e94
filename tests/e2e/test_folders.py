"""Run folders and data folders: many jobs at once, read-only, unfinished, finished."""

from __future__ import annotations

import os

import pytest
import yaml

from tests.e2e.conftest import SMALL, with_tmpfs


def test_three_jobs_of_one_second_get_three_folders(start, tmp_path):
    jobs = [start(2, "fedavg", *SMALL, program=("-m", "fedmpi")) for _ in range(3)]
    results = [job.end() for job in jobs]
    assert [result.code for result in results] == [0, 0, 0], [result.text for result in results]
    folders = list((tmp_path / "runs").iterdir())
    assert len(folders) == 3
    assert all((folder / "model.pt").exists() for folder in folders)


def test_a_folder_in_use_is_refused_and_a_dead_owner_is_not(start, job):
    busy = start(2, *SMALL, "--rounds", "100000")
    busy.wait_for_round(1)
    second = job(2, *SMALL)
    assert second.code == 2
    assert "in use by" in second.errors[0]
    for pid in busy.ranks():
        os.kill(pid, 9)
    assert busy.end(30).code != 0
    third = job(2, *SMALL)
    assert third.code == 0, third.text
    done = len(third.history())
    assert done >= 3
    assert "--rounds asks for 3: nothing to do" in third.out or "going on after round" in third.out


def test_a_finished_run_is_left_alone(job):
    first = job(2, *SMALL)
    before = {path.name: path.stat().st_mtime_ns for path in first.run_dir.iterdir()}
    again = job(3, *SMALL)
    assert again.code == 0
    assert "nothing to do" in again.out
    assert {path.name: path.stat().st_mtime_ns for path in first.run_dir.iterdir()} == before
    other = job(2, *SMALL, "--client-lr", "0.5")
    assert other.code == 2
    assert "--client-lr 0.1" in other.errors[0]


def test_the_model_is_a_plain_state_dict(job):
    import torch

    from fedmpi.models import build_model

    result = job(2, *SMALL)
    state = torch.load(result.run_dir / "model.pt", weights_only=True)
    build_model("2nn", (1, 28, 28), 10).load_state_dict(state, strict=True)
    assert sum(tensor.untyped_storage().nbytes() for tensor in state.values()) == 199_210 * 4


def test_a_run_folder_that_cannot_be_made(job, tmp_path):
    (tmp_path / "file").write_text("")
    result = job(3, *SMALL, "--run-dir", str(tmp_path / "file" / "run"))
    assert result.code == 2
    assert len(result.errors) == 1
    assert "--run-dir" in result.errors[0]


@pytest.mark.parametrize(
    ("file", "passages", "kept"),
    [
        pytest.param("config.yaml", 0, None, marks=pytest.mark.slow),
        pytest.param("history.jsonl", 0, None, marks=pytest.mark.slow),
        ("history.jsonl", 2, 1),
        pytest.param("round-000002.ckpt", 0, 1, marks=pytest.mark.slow),
        pytest.param("model.pt", 0, 3, marks=pytest.mark.slow),
    ],
)
def test_a_full_disk(job, tmp_path, file, passages, kept):
    """As the kernel says it, ENOSPC when the file's data are written; what was kept is gone on with later."""
    (tmp_path / "sitecustomize.py").write_text(
        "import errno, os, pathlib\n"
        "real_open, real_write, passages = pathlib.Path.open, os.write, 0\n"
        "def pass_by():\n"
        "    global passages\n"
        "    passages += 1\n"
        f"    if passages > {passages}:\n"
        "        raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "def full_open(self, *args, **kwargs):\n"
        f"    if {file!r} in self.name and args and args[0] not in ('r', 'rb'):\n"
        "        pass_by()\n"
        "    return real_open(self, *args, **kwargs)\n"
        "def full_write(descriptor, content):\n"
        f"    if {file!r} in os.readlink(f'/proc/self/fd/{{descriptor}}'):\n"
        "        pass_by()\n"
        "    return real_write(descriptor, content)\n"
        "pathlib.Path.open, os.write = full_open, full_write\n"
    )
    options = [*SMALL, "--checkpoint-every", "1"]
    result = job(3, *options, env={"PYTHONPATH": str(tmp_path)})
    assert result.code == 2, result.text
    assert result.text.count("No space left on device") == 1, result.text
    assert "Traceback" not in result.text
    (said,) = [line for line in result.err.splitlines() if "No space left on device" in line]
    assert file in said
    again = job(2, *options)
    assert again.code == 0, again.text
    assert (f"going on after round {kept} of" in again.out) == (kept is not None), again.text
    assert again.bits() == job(1, *SMALL, name="whole").bits()


@pytest.mark.slow
def test_a_disk_of_two_megabytes(tmp_path, data_dir):
    """A real one: room for two checkpoints of the 2NN and not for a third."""
    (tmp_path / "disk").mkdir()
    done = with_tmpfs("2m", tmp_path / "disk", 2, [*SMALL, "--checkpoint-every", "1"], data_dir)
    assert done.code == 2, done.text
    assert "round-000002.ckpt cannot be written: No space left on device" in done.err
    assert done.out.split()[-2:] == ["round-000000.ckpt", "round-000001.ckpt"]


def test_a_data_folder_that_cannot_be_written_needs_no_writing(job, data_dir, tmp_path):
    """A split that cannot be kept is used all the same, with one warning."""
    (tmp_path / "sitecustomize.py").write_text(
        "import errno, os\n"
        f"guarded = {str(data_dir)!r}\n"
        "real = os.open\n"
        "def read_only(path, flags, *args, **kwargs):\n"
        "    if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and str(path).startswith(guarded):\n"
        "        raise OSError(errno.EROFS, 'Read-only file system')\n"
        "    return real(path, flags, *args, **kwargs)\n"
        "os.open = read_only\n"
        "real_mkdir = os.mkdir\n"
        "def mkdir(path, *args, **kwargs):\n"
        "    if str(path).startswith(guarded):\n"
        "        raise OSError(errno.EROFS, 'Read-only file system')\n"
        "    return real_mkdir(path, *args, **kwargs)\n"
        "os.mkdir = mkdir\n"
    )
    args = (*SMALL, "--partition-seed", "77")
    kept_nowhere = job(3, *args, env={"PYTHONPATH": str(tmp_path)}, name="a")
    assert kept_nowhere.code == 0, kept_nowhere.text
    written = job(3, *args, name="b")
    assert kept_nowhere.bits() == written.bits()


@pytest.mark.slow
def test_locks_of_the_kernel_are_not_needed(start, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import errno, fcntl\n"
        "def no_locks(*args):\n"
        "    raise OSError(errno.ENOLCK, 'No locks available')\n"
        "fcntl.flock = fcntl.lockf = no_locks\n"
    )
    env = {"PYTHONPATH": str(tmp_path), "FEDMPI_DATA": str(tmp_path / "empty")}
    jobs = [start(2, *SMALL, env=env, name=f"j{i}") for i in range(3)]
    results = [job.end() for job in jobs]
    assert [result.code for result in results] == [0, 0, 0], [result.text for result in results]
    assert len({result.bits() for result in results}) == 1
    assert not [path for path in (tmp_path / "empty").rglob("*") if "lock" in path.name or path.name.endswith(".tmp")]


def test_a_folder_name_with_letters_of_any_language(job, tmp_path):
    result = job(2, *SMALL, "--run-dir", str(tmp_path / "Läufe ü"))
    assert result.code == 0, result.text
    assert yaml.safe_load((tmp_path / "Läufe ü" / "config.yaml").read_text(encoding="utf-8"))["rounds"] == 3
