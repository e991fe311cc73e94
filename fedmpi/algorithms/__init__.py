"""The algorithms that come with fedmpi, by name; one runnable file per algorithm."""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """An algorithm: "module:Class", and its paper."""

    spec: str
    paper: str


ALGORITHMS = {
    "fedavg": Entry("fedmpi.fedavg:FedAvg", "federated averaging, McMahan et al. 2017"),
}
