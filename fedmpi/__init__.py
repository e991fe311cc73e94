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
    from fedmpi.core.aggregate import Aggregators
    from fedmpi.core.client_manager import ClientPassiveManager
    from fedmpi.core.handler import ParameterServerBackendHandler, SyncParameterServerHandler
    from fedmpi.core.manager import NetworkManager
    from fedmpi.core.messages import MessageCode
    from fedmpi.core.server_manager import ServerManager
    from fedmpi.core.trainer import ClientSGDTrainer, ClientTrainer
    from fedmpi.core.vector import SerializationTool
    from fedmpi.data.partitioners import noniid_slicing, random_slicing
    from fedmpi.data.split_file import load_dict, save_dict
    from fedmpi.embedded import Run, run
    from fedmpi.errors import FedmpiError
    from fedmpi.fedlab import PackageProcessor
    from fedmpi.lifecycle.exits import abort_on_crash
    from fedmpi.lifecycle.progress import beat

_HOME = {
    "Aggregators": "core.aggregate",
    "ClientPassiveManager": "core.client_manager",
    "ClientSGDTrainer": "core.trainer",
    "ClientTrainer": "core.trainer",
    "FedmpiError": "errors",
    "MessageCode": "core.messages",
    "NetworkManager": "core.manager",
    "PackageProcessor": "fedlab",
    "ParameterServerBackendHandler": "core.handler",
    "Run": "embedded",
    "SerializationTool": "core.vector",
    "ServerManager": "core.server_manager",
    "SyncParameterServerHandler": "core.handler",
    "abort_on_crash": "lifecycle.exits",
    "beat": "lifecycle.progress",
    "load_dict": "data.split_file",
    "noniid_slicing": "data.partitioners",
    "random_slicing": "data.partitioners",
    "run": "embedded",
    "save_dict": "data.split_file",
}

__all__ = [
    "Aggregators",
    "ClientPassiveManager",
    "ClientSGDTrainer",
    "ClientTrainer",
    "FedmpiError",
    "MessageCode",
    "NetworkManager",
    "PackageProcessor",
    "ParameterServerBackendHandler",
    "Run",
    "SerializationTool",
    "ServerManager",
    "SyncParameterServerHandler",
    "abort_on_crash",
    "beat",
    "load_dict",
    "noniid_slicing",
    "random_slicing",
    "run",
    "save_dict",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fedmpi' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fedmpi.{_HOME[name]}"), name)
