"""FedLab's names in one place: its example runs with `from fedmpi import ...` or `from fedmpi.fedlab import ...`.

Thin adapters over the rest, which add nothing to the fast path; where FedLab spells a name otherwise, both spellings
are there.
"""

from __future__ import annotations

from fedmpi.core.order import MessageCode
from fedmpi.core.vector import SerializationTool
from fedmpi.data.partitioners import noniid_slicing, random_slicing
from fedmpi.data.split_file import load_dict, save_dict
from fedmpi.fedlab.aggregate import Aggregators
from fedmpi.fedlab.handler import ParameterServerBackendHandler, SyncParameterServerHandler
from fedmpi.fedlab.managers import ClientPassiveManager, NetworkManager, ServerManager
from fedmpi.fedlab.package_processor import PackageProcessor
from fedmpi.fedlab.trainer import ClientSGDTrainer, ClientTrainer

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
