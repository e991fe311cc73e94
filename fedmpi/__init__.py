"""fedmpi: federated-learning simulation as one MPI job.

    mpirun -n 11 python -m fedmpi.fedavg --dataset mnist

The parts a script of one's own is made of can be imported from here; each is loaded when it is first asked for, so
`import fedmpi` needs neither torch nor an MPI library.
"""

from __future__ import annotations

from fedmpi import interrupt  # the first of all, and cheap

if interrupt.is_own_program():
    interrupt.end_at_once()

import importlib
from typing import TYPE_CHECKING, Any

from fedmpi.version import __version__ as __version__

if TYPE_CHECKING:
    from fedmpi.algorithm import Algorithm, Client, Clip, Segments, Server, Transform
    from fedmpi.config import RunConfig
    from fedmpi.core.order import MessageCode
    from fedmpi.core.vector import SerializationTool
    from fedmpi.data.partitioners import noniid_slicing, random_slicing
    from fedmpi.data.split_file import load_dict, save_dict
    from fedmpi.embedded import Run, run
    from fedmpi.errors import FedmpiError
    from fedmpi.fedlab import (
        Aggregators,
        ClientPassiveManager,
        ClientSGDTrainer,
        ClientTrainer,
        NetworkManager,
        PackageProcessor,
        ParameterServerBackendHandler,
        ServerManager,
        SyncParameterServerHandler,
    )
    from fedmpi.lifecycle.exits import abort_on_crash
    from fedmpi.lifecycle.progress import beat
    from fedmpi.options import option


_HOME = {
    "Aggregators": "fedlab",
    "Algorithm": "algorithm",
    "Client": "algorithm",
    "ClientPassiveManager": "fedlab",
    "ClientSGDTrainer": "fedlab",
    "ClientTrainer": "fedlab",
    "Clip": "algorithm",
    "FedmpiError": "errors",
    "MessageCode": "core.order",
    "NetworkManager": "fedlab",
    "PackageProcessor": "fedlab",
    "ParameterServerBackendHandler": "fedlab",
    "Run": "embedded",
    "RunConfig": "config",
    "Segments": "algorithm",
    "SerializationTool": "core.vector",
    "Server": "algorithm",
    "ServerManager": "fedlab",
    "SyncParameterServerHandler": "fedlab",
    "Transform": "algorithm",
    "abort_on_crash": "lifecycle.exits",
    "beat": "lifecycle.progress",
    "load_dict": "data.split_file",
    "noniid_slicing": "data.partitioners",
    "option": "options",
    "random_slicing": "data.partitioners",
    "run": "embedded",
    "save_dict": "data.split_file",
}

__all__ = [
    "Aggregators",
    "Algorithm",
    "Client",
    "ClientPassiveManager",
    "ClientSGDTrainer",
    "ClientTrainer",
    "Clip",
    "FedmpiError",
    "MessageCode",
    "NetworkManager",
    "PackageProcessor",
    "ParameterServerBackendHandler",
    "Run",
    "RunConfig",
    "Segments",
    "SerializationTool",
    "Server",
    "ServerManager",
    "SyncParameterServerHandler",
    "Transform",
    "abort_on_crash",
    "beat",
    "load_dict",
    "noniid_slicing",
    "option",
    "random_slicing",
    "run",
    "save_dict",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fedmpi' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fedmpi.{_HOME[name]}"), name)
