"""Device of a trainer: a GPU picked by its index among the trainers of its node, or the CPU with fixed threads.

Indices are logical: `cuda:0` is the first GPU this process sees, whatever CUDA_VISIBLE_DEVICES says in whatever form
(numbers, UUIDs, MIG names, a list cut at the first invalid entry, nothing); only torch and the driver read it. The
server is given no GPU, so it opens no context on one.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedmpi.errors import ConfigError
from fedmpi.mpi.processes import SERVER_RANK, own_node_rank

if TYPE_CHECKING:
    import torch

CPUINFO = Path("/proc/cpuinfo")


def own_gpu() -> torch.device:
    """Open the GPU that a trainer of this rank pins, as a job does; without a job the first one.

    Raises:
        ConfigError: no GPU is visible, or it is full or refuses one more process.
    """
    import torch

    node, rank = own_node_rank()
    visible, where = visible_gpus(), f"rank {rank}"
    name = pick_device("cuda", local_trainer_index(node, rank), visible, where)
    return open_device(name, torch.get_num_threads(), trainers_sharing(node, rank, visible), where)


def mixed_devices(places: Sequence[tuple[str, str]]) -> str | None:
    """One line if some trainers have a GPU and others have none, else None.

    Args:
        places: (host, device) of each trainer, in the order of their ranks.
    """
    hosts = {kind: sorted({host for host, device in places if device.startswith(kind)}) for kind in ("cuda", "cpu")}
    if not all(hosts.values()):
        return None
    return (
        f"--device auto finds a GPU for trainers on {', '.join(hosts['cuda'])} and none on {', '.join(hosts['cpu'])},"
        " and the bits would depend on who trains a client: give --device cpu, or start ranks only where there are GPUs"
    )


def local_trainer_index(node_ranks: Sequence[int], rank: int) -> int:
    """Position of `rank` among the trainers of its node.

    Args:
        node_ranks: ranks of this node in ascending order, the server's among them where it is here.
        rank: a trainer's; the server's gives 0, for a job of one rank, which trains itself.
    """
    if rank == SERVER_RANK:
        return 0
    return [other for other in node_ranks if other != SERVER_RANK].index(rank)


def trainers_sharing(node_ranks: Sequence[int], rank: int, visible_count: int) -> int:
    """Return the number of trainers of the node that pick the GPU that `rank` picks, if all see the same GPUs."""
    trainers = max(1, sum(other != SERVER_RANK for other in node_ranks))
    return len(range(local_trainer_index(node_ranks, rank) % visible_count, trainers, visible_count))


def visible_gpus() -> int:
    """GPUs this process may use. Opens no context: torch asks NVML, or for MIG slices the driver's list."""
    import torch

    return torch.cuda.device_count()


def pick_device(requested: str, trainer_idx_on_node: int, visible_count: int, where: str = "this process") -> str:
    """The name of a trainer's device, "cpu" or "cuda:i"; round robin where trainers outnumber GPUs.

    Args:
        requested: --device: "auto", "cpu" or "cuda".
        trainer_idx_on_node: `local_trainer_index`; with one visible GPU (srun --gpus-per-task) it does not matter.
        visible_count: `visible_gpus()`.
        where: e.g. "rank 3 on node17", for the message.

    Raises:
        ConfigError: "cuda" is wanted and no GPU is visible.
    """
    if requested == "cpu" or (requested == "auto" and visible_count == 0):
        return "cpu"
    if visible_count == 0:
        mask = os.environ.get("CUDA_VISIBLE_DEVICES")
        because = "" if mask is None else f" (CUDA_VISIBLE_DEVICES={mask!r})"
        raise ConfigError(f"--device cuda: no GPU is visible to {where}{because}; --device auto falls back to the CPU")
    return f"cuda:{trainer_idx_on_node % visible_count}"


def open_device(name: str, threads: int, sharing: int = 1, where: str = "this process") -> torch.device:
    """Make `name` this process's device and everything on it repeatable. Call once, before any arithmetic.

    Args:
        name: from `pick_device`; "cpu" for the server.
        threads: of CPU arithmetic. The last bits of a matrix product depend on it.
        sharing: `trainers_sharing`, for the message.
        where: e.g. "rank 3 on node17", for the message.

    Raises:
        ConfigError: the GPU is full, or refuses one more process.
    """
    import torch

    torch.set_num_threads(threads)
    if torch.get_num_interop_threads() != 1:
        with contextlib.suppress(RuntimeError):  # torch takes it once, before its first work; it decides no bits
            torch.set_num_interop_threads(1)
    device = torch.device(name)
    if device.type == "cuda":
        _make_repeatable()
        _first_touch(device, sharing, where)
    return device


def host_buffer(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A (size,) uninitialised buffer in host memory, for MPI; page-locked if its content moves to or from a GPU."""
    import torch

    return torch.empty(size, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")


def capability(device: torch.device | None = None) -> str:
    """Return what decides the last bits beside torch and threads: the GPU's model, or the CPU's vector unit and vendor.

    The vendor counts because the matrix library picks its kernels by it too.
    """
    import torch

    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.backends.cpu.get_cpu_capability()} {_cpu_vendor()}"


def _make_repeatable() -> None:
    """The same bits from the same GPU model, run after run; to be called before the first CUDA call."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else concurrent streams change cuBLAS's split of sums
    torch.backends.cudnn.benchmark = False  # it picks convolutions by stopwatch
    torch.backends.cudnn.deterministic = True  # no convolution gradients by atomic additions
    torch.backends.cudnn.allow_tf32 = False  # on by default: 10-bit mantissas; the engines must agree in float32
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)  # scatter and the like; a user's model may lack a choice
    # a debugging aid that the line above turns on; torch keeps it on a module class, which mypy does not see
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _first_touch(device: torch.device, sharing: int, where: str) -> None:
    """Open the context now, where a refusal can be told in one line, and on this card only."""
    import torch

    try:
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except RuntimeError as error:  # out of memory is one, too
        text = str(error).lower()
        if "busy or unavailable" not in text and "out of memory" not in text:
            raise
        what = "has no memory left" if "out of memory" in text else "is busy or unavailable"
        shared = f"{sharing} trainer{'s share' if sharing != 1 else ' uses'} it"
        raise ConfigError(
            f"{_card(device)} {what} for {where}; {shared}: start fewer ranks per GPU, "
            "or have exclusive mode turned off (nvidia-smi -c 0) or MPS started"
        ) from error


def _card(device: torch.device) -> str:
    import torch

    try:
        return f"{device} ({torch.cuda.get_device_name(device)})"
    except RuntimeError:  # the card that refuses may refuse this as well
        return str(device)


def _cpu_vendor(cpuinfo: Path = CPUINFO) -> str:
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("vendor_id"):
                return line.partition(":")[2].strip()
    return platform.machine()
