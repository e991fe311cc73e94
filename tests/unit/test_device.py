from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmpi.core.exactsum import ExactSum
from fedmpi.errors import ConfigError
from fedmpi.fedlab.trainer import ClientSGDTrainer
from fedmpi.machine import device
from fedmpi.mpi.processes import note_node_rank


@pytest.fixture
def restored_torch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Torch's process-wide switches as they were, after the test."""
    threads = torch.get_num_threads()
    cudnn = torch.backends.cudnn
    saved = (cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = saved
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("visible", "trainer_idx", "expected"),
    [(1, 3, "cuda:0"), (4, 5, "cuda:1"), (2, 0, "cuda:0"), (0, 1, "cpu")],
)
def test_round_robin_over_visible_gpus(visible: int, trainer_idx: int, expected: str) -> None:
    assert device.pick_device("auto", trainer_idx, visible) == expected


def test_cpu_is_cpu_even_beside_gpus() -> None:
    assert device.pick_device("cpu", 0, 4) == "cpu"


def test_physical_numbers_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert [device.pick_device("cuda", idx, 2) for idx in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]


def test_cuda_without_a_gpu_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ConfigError, match=r"^--device cuda: no GPU is visible to rank 3 on node17; "):
        device.pick_device("cuda", 0, 0, "rank 3 on node17")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match=r"\(CUDA_VISIBLE_DEVICES=''\)"):
        device.pick_device("cuda", 0, 0)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, 4),
        ("", 0),
        ("-1", 0),
        ("2,3", 2),
        ("0,1,2,6", 3),  # the first invalid entry ends the list
        ("1,-1,2", 1),
        ("1,1", 0),
        ("GPU-bbbb,GPU-cccc", 2),
        ("GPU-bbbb,GPU-9999,GPU-cccc", 1),
        ("MIG-1", 1),
    ],
)
def test_visible_gpus_follows_the_mask(monkeypatch: pytest.MonkeyPatch, mask: str | None, expected: int) -> None:
    """Torch's own reading of the mask, on a machine with four cards and, for the driver's count, one MIG slice."""
    for name in ("_is_compiled", "_raw_device_count_nvml", "_raw_device_uuid_nvml"):
        if not hasattr(torch.cuda, name):
            pytest.skip(f"this torch counts without {name}")
    if mask is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    monkeypatch.setattr(torch.cuda, "_cached_device_count", None)
    monkeypatch.setattr(torch.cuda, "_initialized", False)
    monkeypatch.setattr(torch.cuda, "_is_compiled", lambda: True)
    monkeypatch.setattr(torch.cuda, "_raw_device_count_nvml", lambda: 4)
    monkeypatch.setattr(torch.cuda, "_raw_device_uuid_nvml", lambda: [f"GPU-{c * 4}" for c in "abcd"])
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", lambda: 1, raising=False)
    assert device.visible_gpus() == expected


def test_local_trainer_index_leaves_the_server_out() -> None:
    assert [device.local_trainer_index([0, 1, 2, 5], rank) for rank in (1, 2, 5)] == [0, 1, 2]
    assert [device.local_trainer_index([3, 4], rank) for rank in (3, 4)] == [0, 1]
    assert device.local_trainer_index([0], 0) == 0


def test_trainers_sharing() -> None:
    node = [0, 1, 2, 3, 4, 5]  # five trainers, two GPUs: 1, 3, 5 and 2, 4
    assert [device.trainers_sharing(node, rank, 2) for rank in (1, 2, 3, 4, 5)] == [3, 2, 3, 2, 3]
    assert device.trainers_sharing(node, 1, 8) == 1
    assert device.trainers_sharing([0], 0, 1) == 1


@pytest.mark.usefixtures("restored_torch")
def test_open_cpu_sets_threads_and_may_be_called_again() -> None:
    for threads in (2, 1):
        assert device.open_device("cpu", threads) == torch.device("cpu")
        assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.usefixtures("restored_torch")
def test_open_gpu_touches_its_own_card_only(monkeypatch: pytest.MonkeyPatch) -> None:
    touched: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_device", touched.append)
    monkeypatch.setattr(torch, "zeros", lambda size, device: touched.append(device))
    assert device.open_device("cuda:1", 1) == torch.device("cuda:1")
    assert touched == [torch.device("cuda:1")] * 2
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (True, False)
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (False, False)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.usefixtures("restored_torch")
@pytest.mark.parametrize(
    ("error", "what"),
    [
        (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nmore"), "is busy or unavailable"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "has no memory left"),
    ],
)
def test_a_card_that_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, what: str) -> None:
    def refuse(card: object) -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda card: "Big GPU")
    with pytest.raises(ConfigError) as caught:
        device.open_device("cuda:0", 1, 3, "rank 2 on node17")
    assert str(caught.value).startswith(f"cuda:0 (Big GPU) {what} for rank 2 on node17; 3 trainers share it: ")
    assert "exclusive mode" in str(caught.value)
    assert "MPS" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("restored_torch")
def test_another_gpu_error_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(card: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        device.open_device("cuda:0", 1)


def test_host_buffer_is_plain_beside_the_cpu_and_pinned_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = device.host_buffer(5, torch.float32, torch.device("cpu"))
    assert (buffer.shape, buffer.dtype, buffer.device.type) == ((5,), torch.float32, "cpu")
    asked: dict[str, Any] = {}
    monkeypatch.setattr(torch, "empty", lambda size, **kwargs: asked.update(kwargs))
    device.host_buffer(5, torch.int64, torch.device("cuda:0"))
    assert asked == {"dtype": torch.int64, "device": "cpu", "pin_memory": True}


def test_capability(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert device.capability().startswith(torch.backends.cpu.get_cpu_capability())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda card: f"Big GPU {card.index}")
    assert device.capability(torch.device("cuda:1")) == "Big GPU 1"
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nvendor_id\t: SomeVendor\n")
    assert device._cpu_vendor(cpuinfo) == "SomeVendor"
    assert device._cpu_vendor(tmp_path / "missing") != ""


@pytest.mark.usefixtures("restored_torch")
def test_a_trainer_that_wants_cuda_takes_the_gpu_that_a_job_would_give_its_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[str] = []

    def opens(name: str, threads: int, sharing: int, where: str) -> torch.device:
        opened.append(f"{name}, {sharing} share it, {where}")
        return torch.device("cpu")

    monkeypatch.setattr(device, "visible_gpus", lambda: 2)
    monkeypatch.setattr(device, "open_device", opens)
    model = torch.nn.Linear(2, 1)
    for node, rank in (([0, 1, 2, 3], 3), ([4, 5], 5), ([0], 0)):
        note_node_rank(node, rank)
        loader, optimizer = [(torch.ones(1, 2), torch.ones(1, 1))], torch.optim.SGD(model.parameters(), 0.1)
        ClientSGDTrainer(model, loader, 1, optimizer, torch.nn.MSELoss(), cuda=True)
    assert opened == [
        "cuda:0, 2 share it, rank 3",
        "cuda:1, 1 share it, rank 5",
        "cuda:0, 1 share it, rank 0",
    ]


def test_nodes_with_and_without_gpus_in_one_job_are_told_what_to_do() -> None:
    assert device.mixed_devices([("a", "cuda:0"), ("a", "cuda:1"), ("b", "cuda:0")]) is None
    assert device.mixed_devices([("a", "cpu"), ("b", "cpu")]) is None
    assert device.mixed_devices([]) is None
    said = device.mixed_devices([("b", "cpu"), ("a", "cuda:0"), ("c", "cpu"), ("b", "cpu")])
    assert said is not None
    assert said.startswith("--device auto finds a GPU for trainers on a and none on b, c, and the bits would depend on")
    assert said.endswith("give --device cpu, or start ranks only where there are GPUs")


@pytest.mark.gpu
def test_a_sum_on_a_gpu_is_copied_once() -> None:
    gpu = device.own_gpu()
    exact = ExactSum(torch.zeros(5, device=gpu), 1, 1)
    exact.add(torch.ones(5, device=gpu), 1)
    first, again = exact.buffers(1)[0], exact.buffers(2)[0]
    assert first.__array_interface__["data"] == again.__array_interface__["data"]
