"""FedLab's names in one place: its example runs with `from fedmpi import ...` or `from fedmpi.fedlab import ...`.

Each is the object that fedmpi itself uses; where FedLab spells a name otherwise, both spellings are there.
"""

from __future__ import annotations

from fedmpi import (
    Aggregators,
    ClientPassiveManager,
    ClientSGDTrainer,
    ClientTrainer,
    MessageCode,
    NetworkManager,
    PackageProcessor,
    ParameterServerBackendHandler,
    SerializationTool,
    ServerManager,
    SyncParameterServerHandler,
    load_dict,
    noniid_slicing,
    random_slicing,
    save_dict,
)

__all__ = [
    "Aggregators",
    "ClientPassiveManager",
    "ClientSGDTrainer",
    "ClientTrainer",
    "MessageCode",
    "NetworkManager",
    "PackageProcessor",
    "ParameterServerBackendHandler",
    "SerializationTool",
    "ServerManager",
    "SyncParameterServerHandler",
    "load_dict",
    "noniid_slicing",
    "random_slicing",
    "save_dict",
]
