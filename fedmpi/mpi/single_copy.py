"""Large messages within a node without `process_vm_readv`, where that call is forbidden.

MPI libraries have a rank read a large message straight out of the sender's memory. Containers forbid the call (a
seccomp filter), or give each rank a user namespace of its own; MPICH then crashes on the first large message. So the
call is tried before MPI starts, and switched off if it fails; messages are copied twice then, through shared memory.
Where ranks may have user namespaces of their own, which no rank can see, it is switched off too.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import MutableMapping
from pathlib import Path

from fedmpi.mpi.processes import PROC, namespace

SWITCHES = {
    "MPIR_CVAR_CH4_CMA_ENABLE": "0",  # MPICH
    "OMPI_MCA_smsc": "^cma",  # Open MPI
    "OMPI_MCA_btl_vader_single_copy_mechanism": "none",  # the same before version 5
    "FI_SHM_DISABLE_CMA": "1",  # libfabric, under either
    "UCX_POSIX_USE_PROC_LINK": "n",  # UCX, under either, tries the call by itself, but not this door to other ranks
}

_HOST = "user:[4026531837]"  # a fixed number of Linux


class _Part(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("length", ctypes.c_size_t)]


def avoid_single_copy(environ: MutableMapping[str, str] = os.environ, proc: Path = PROC) -> bool:
    """Switch off reading other ranks' memory, unless it works here; what the user has set stays.

    Returns:
        True if it is off.
    """
    if reads_memory() and namespace("user", proc) == _HOST:  # the others are in the host's, too
        return False
    for name, value in SWITCHES.items():
        environ.setdefault(name, value)
    return True


def reads_memory() -> bool:
    """Return True if `process_vm_readv` works on this process itself."""
    source, target = ctypes.create_string_buffer(b"1"), ctypes.create_string_buffer(b"0")
    parts = [_Part(ctypes.addressof(buffer), 1) for buffer in (target, source)]
    try:
        call = ctypes.CDLL(None, use_errno=True).process_vm_readv
    except (AttributeError, OSError):
        return False
    call.restype = ctypes.c_ssize_t
    local, remote = (ctypes.byref(part) for part in parts)
    return bool(call(os.getpid(), local, 1, remote, 1, 0) == 1) and target.raw == source.raw
