"""Parts of `config.yaml`'s provenance: what goes into the model, and where the split came from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fedmpi.config import RunConfig
from fedmpi.data.datasets import Dataset
from fedmpi.data.split_file import read_manifest


def input_record(dataset: Dataset) -> dict[str, list[object]]:
    """Return what model.pt needs elsewhere: shape of a sample, mean and std per channel (of x / 255), class names."""
    return {
        "input_shape": [*dataset.input_shape],
        "mean": [*dataset.mean],
        "std": [*dataset.std],
        "classes": [*dataset.classes],
    }


def split_record(config: RunConfig, sha256: str) -> dict[str, dict[str, object]]:
    """Return the file that the split came from, its SHA-256 as a split, and its manifest; empty: from no file."""
    if config.partition_file is None:
        return {}
    path = Path(config.partition_file).expanduser()
    manifest = read_manifest(path)
    written = dataclasses.asdict(manifest) if manifest else "none"
    return {"partition_file": {"file": str(path.absolute()), "partition_sha256": sha256, "manifest": written}}
