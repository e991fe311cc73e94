"""The README's own words: its script runs as it stands, and its commands are what CI installs by."""

from __future__ import annotations

import re

import pytest

from tests.e2e.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def script() -> str:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (text,) = (block for block in blocks if "ClientPassiveManager" in block)
    return text


def test_the_page_script_runs_and_learns(job, tmp_path):
    (tmp_path / "my_script.py").write_text(script())
    result = job(4, "my_script.py", program=())
    assert result.code == 0, result.text
    accuracies = [float(text) for text in re.findall(r"round \d+: accuracy (0\.\d+)", result.out)]
    assert len(accuracies) == 10
    assert accuracies[-1] > 0.8
    again = job(4, "my_script.py", program=())
    assert re.findall("round.*", again.out) == re.findall("round.*", result.out)


@pytest.mark.slow
def test_the_page_script_on_the_wrong_number_of_ranks_says_so_once(job, tmp_path):
    (tmp_path / "my_script.py").write_text(script())
    result = job(3, "my_script.py", program=())
    assert result.code == 2
    assert len(result.errors) == 1
    assert "mpirun -n 4" in result.errors[0]


def test_an_exception_in_the_page_script_ends_all_ranks(job, tmp_path):
    broken = script().replace("nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)", "raise ValueError('boom')")
    (tmp_path / "my_script.py").write_text(broken)
    result = job(4, "my_script.py", program=())
    assert result.code == 1, result.text
    assert result.text.count("ValueError: boom") == 1


@pytest.mark.slow
def test_an_exception_on_the_server_ends_all_ranks(job, tmp_path):
    broken = script().replace("mean = torch.stack(model_parameters_list).mean(0)", "raise ValueError('boom')")
    (tmp_path / "my_script.py").write_text(broken)
    result = job(4, "my_script.py", program=())
    assert result.code == 1, result.text
    assert result.text.count("ValueError: boom") == 1
    assert "rank 0" in result.err


def test_ci_installs_by_the_readmes_test_command():
    (install,) = re.findall(r"&& (pip install \S+) && mpiexec -n 3 pytest", README)
    ci = (ROOT / ".ci" / "run").read_text()
    assert install.replace("pip install", "pip install -q") in ci
    assert "mpiexec -n 3 pytest" in ci
