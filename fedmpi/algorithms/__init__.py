"""The algorithms that come with fedmpi, by name; one runnable file per algorithm."""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """An algorithm: "module:Class", and its paper."""

    spec: str
    paper: str


ALGORITHMS = {
    "fedavg": Entry("fedmpi.fedavg:FedAvg", "federated averaging, McMahan et al. 2017"),
    "fedprox": Entry("fedmpi.algorithms.fedprox:FedProx", "a proximal term on clients, Li et al. 2020"),
    "fedadam": Entry("fedmpi.algorithms.fedadam:FedAdam", "Adam on the server, Reddi et al. 2021"),
    "trimmed_mean": Entry("fedmpi.algorithms.trimmed_mean:TrimmedMean", "robust mean by coordinate, Yin et al. 2018"),
    "power_of_choice": Entry(
        "fedmpi.algorithms.power_of_choice:PowerOfChoice", "clients of the largest losses, Cho et al. 2020"
    ),
    "per_fedavg": Entry(
        "fedmpi.algorithms.per_fedavg:PerFedAvg", "a start for personal models (MAML), Fallah et al. 2020"
    ),
    "mime_lite": Entry(
        "fedmpi.algorithms.mime_lite:MimeLite", "the server's momentum on clients, Karimireddy et al. 2021"
    ),
}
