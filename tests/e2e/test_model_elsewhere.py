"""README's lines that use model.pt outside the run."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
import yaml

from fedmpi.data.datasets import load_dataset
from tests.e2e.conftest import ROOT, SMALL


def test_the_lines_of_the_readme_predict_as_the_run_did(job, monkeypatch):
    result = job(1, *SMALL)
    assert result.code == 0, result.text
    (lines,) = re.findall(
        r"```python\n(import pathlib, torch, yaml\n.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL
    )
    test = load_dataset("synthetic").test
    names = {"images": torch.from_numpy(np.array(test.x))}
    monkeypatch.chdir(result.run_dir)
    exec(lines, names)
    classes = yaml.safe_load(Path("config.yaml").read_text(encoding="utf-8"))["provenance"]["classes"]
    right = np.mean([classes[label] == name for label, name in zip(test.y, names["names"], strict=True)])
    assert right == result.rows()[-1]["accuracy"]
