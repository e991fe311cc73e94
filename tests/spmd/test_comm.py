from __future__ import annotations

import dataclasses
import socket

import numpy as np
import pytest
import torch
from fedmpi.core.collection import bcast_order, collect
from fedmpi.core.messages import ClientUpdate, LocalWork, MessageCode, Order

from fedmpi import PackageProcessor
from fedmpi.core import collection
from fedmpi.errors import ConfigError, DisagreementError, TransferError
from fedmpi.mpi import comm as comm_module
from fedmpi.mpi import tree
from fedmpi.mpi.setup import on_all, on_every_rank, on_root, require_same
from fedmpi.mpi.tree import bcast_vector, gather_rows, reduce_sum

STATE = np.arange(3)


def order(code=MessageCode.PARAMETER_UPDATE, ranks=(), rows=0):
    cohort = np.arange(10, 10 + len(ranks))
    return Order(code, 7, cohort, np.array(ranks, np.int64), cohort - 3, STATE, 5, rows)


class Recorder:
    def __init__(self):
        self.updates, self.blocks = {}, []

    def on_receive(self, sender_rank, message_code, payload):
        self.updates[sender_rank] = (message_code, payload)

    def on_block(self, columns, rows):
        self.blocks.append((columns, rows.copy()))


class FakeSum:
    def __init__(self, sums):
        self.sums = sums

    @property
    def num_bins(self):
        return len(self.sums)

    def buffers(self, num_bins):
        self.sums += [np.zeros_like(self.sums[0]) for _ in range(num_bins - len(self.sums))]
        return self.sums


def test_an_order_arrives_as_it_was_sent(net, agree):
    sent = order(ranks=(1, 2, 1))
    got = bcast_order(net, sent if net.is_server else None)
    same = (
        all(np.array_equal(getattr(sent, name), getattr(got, name)) for name in sent.__dataclass_fields__)
        and got.code is MessageCode.PARAMETER_UPDATE
    )
    agree(same, got)


@pytest.mark.parametrize("limit", [1, 7, 8, 9, 64, 2**30])
@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint8])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9])
def test_bcast_vector_in_pieces(net, agree, limit, dtype, size):
    """Counts just below, at and above the largest message."""
    want = np.arange(size).astype(dtype)
    got = bcast_vector(net, want.copy() if net.is_server else np.zeros(size, dtype), piece_bytes=limit)
    agree(np.array_equal(got, want), got)


@pytest.mark.parametrize("limit", [4, 8, 2**30])
def test_bcast_vector_into_a_tensor(net, agree, limit):
    """The way to a device, on the CPU: trainers hand over the bytes of a tensor."""
    got = torch.arange(5.0) if net.is_server else torch.zeros(5)
    bcast_vector(net, got.numpy() if net.is_server else got.view(torch.uint8), piece_bytes=limit)
    agree(torch.equal(got, torch.arange(5.0)), got)


@pytest.mark.parametrize("limit", [1, 15, 16, 17, 2**30])
def test_reduce_sum_in_pieces_is_exact(net, agree, limit):
    mine = np.array([2**61 - 1, -(2**61), net.rank, 0, 1]) // net.size
    sums = mine.copy()
    reduce_sum(net, sums, piece_bytes=limit)
    every = sum(np.array([2**61 - 1, -(2**61), rank, 0, 1]) // net.size for rank in range(net.size))
    agree(not net.is_server or np.array_equal(sums, every), sums)


@pytest.mark.parametrize("limit", [1, 10, 12, 2**30])
def test_gather_rows_in_pieces_with_empty_ranks(net, agree, limit):
    rows = np.full((net.rank % 2 * (net.rank + 1), 3), net.rank, np.float32)
    got = gather_rows(net, rows, piece_bytes=limit)
    want = np.concatenate([np.full((rank % 2 * (rank + 1), 3), rank, np.float32) for rank in range(net.size)])
    agree(np.array_equal(got, want if net.is_server else np.empty((0, 3))), got)


def test_collect_a_sum_with_a_bin_that_only_one_rank_opened(net, agree):
    sums = FakeSum([np.full(4, net.rank), *([np.full(4, 100)] if net.rank == 1 else [])])
    mine = [ClientUpdate(10 + net.rank, net.rank, 0.5, 0.1, 1 if net.rank == 1 else 0, STATE)] if net.rank else []
    recorder = Recorder()
    collect(net, order(ranks=range(1, net.size)), LocalWork(mine, sums), recorder)
    if net.is_server:
        total = sum(range(net.size))
        ok = [s.tolist() for s in sums.sums] == [[total] * 4, [100 if net.size > 1 else 0] * 4][: len(sums.sums)]
        ok &= [len(payload) for _, payload in recorder.updates.values()] == [0] + [1] * (net.size - 1)
        ok &= all(code is MessageCode.GRADIENT_UPDATE for code, _ in recorder.updates.values())
        ok &= recorder.updates[1][1][0].bin_idx == 1
        ok &= np.array_equal(recorder.updates[1][1][0].integer_state, STATE)
        agree(ok, (sums.sums, recorder.updates))
    else:
        agree(not recorder.updates, recorder.updates)


def test_collect_rows_in_blocks_of_bounded_size(net, agree, monkeypatch):
    monkeypatch.setattr(collection, "BLOCK_BYTES", 4 * 2 * (net.size - 1))  # two columns at a time
    rows = [np.arange(5, dtype=np.float32) + 10 * net.rank] if net.rank else []
    mine = [ClientUpdate(10 + net.rank, 1, 0.5, 0.1, 0, STATE)] if net.rank else []
    recorder = Recorder()
    collect(net, order(ranks=range(1, net.size), rows=1), LocalWork(mine, rows=rows), recorder)
    if not net.is_server:
        agree(not recorder.blocks, recorder.blocks)
        return
    columns = [(c.start, c.stop) for c, _ in recorder.blocks]
    whole = np.concatenate([block for _, block in recorder.blocks], 1)
    want = np.stack([np.arange(5) + 10 * rank for rank in range(1, net.size)])
    agree(columns == [(0, 2), (2, 4), (4, 5)] and np.array_equal(whole, want), (columns, whole))


def test_collect_metrics_are_summed(net, agree):
    work = LocalWork(metrics=np.array([1, net.rank, 2, 0]))
    collect(net, order(MessageCode.EVALUATE_PARAMS), work, Recorder())
    agree(not net.is_server or work.metrics.tolist() == [net.size, sum(range(net.size)), 2 * net.size, 0], work.metrics)


def test_on_root_shares_results_and_mistakes(net, agree):
    agree(on_root(net, lambda: net.rank + 40) == 40)
    kept = on_root(net, lambda: "kept", share=False)
    agree(kept == ("kept" if net.is_server else None), kept)
    with pytest.raises(ConfigError, match="the mistake") as caught:
        on_root(net, _raise_config_error)
    agree(caught.value.everywhere)


def _raise_config_error():
    raise ConfigError("the mistake")


def test_on_all_raises_the_error_of_one_rank_on_all_and_names_it(net):
    def fail_on_last():
        if net.rank == net.size - 1:
            raise ConfigError("only here")

    with pytest.raises(ConfigError, match=rf"only here \(rank {net.size - 1} of {net.size}\)"):
        on_all(net, fail_on_last)


def test_on_all_says_an_error_of_all_ranks_once(net):
    with pytest.raises(ConfigError, match=r"^the mistake$"):
        on_all(net, _raise_config_error)


def test_a_fact_that_differs_names_ranks_and_values(net):
    facts = {"torch version": "2.2" if net.rank == 1 else "2.4", "parameter count": 10}
    with pytest.raises(DisagreementError, match=r"torch version is 2\.4 on rank.* 0.* but 2\.2 on rank 1$"):
        require_same(net, facts)
    require_same(net, {"parameter count": 10})


def test_ranks_of_node_need_no_name(net, agree, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "no_such-host")
    agree(net.node == list(range(net.size)), net.node)


def test_no_other_communicator_meets_our_messages(net, agree):
    """A user's own traffic on the world does not disturb a round, and the other way round."""
    from mpi4py import MPI

    request = MPI.COMM_WORLD.Ibarrier()
    largest = net.max_of(net.rank)
    request.Wait()
    agree(largest == net.size - 1, largest)


def test_only_one_rank_of_a_node_has_the_last_words(net, agree, tmp_path, monkeypatch):
    own = comm_module.Comm()
    said = tmp_path / f"said-{net.rank}"
    monkeypatch.setattr(comm_module.os, "write", lambda descriptor, data: said.write_bytes(data))
    own.last_words("why")
    monkeypatch.undo()
    count = on_root(net, lambda: len(list(tmp_path.glob("said-*"))))
    agree(count == 1, count)


def unfit(case, array):
    """A sound buffer made unfit, or unlike the other ranks'."""
    if case == "read-only":
        array.flags.writeable = False
        return array
    return {
        "strided": lambda: np.repeat(array, 2, axis=-1)[..., ::2],
        "transposed": lambda: np.asfortranarray(array.reshape(-1, 6)),
        "shorter": lambda: array[..., :-1].copy(),
        "longer": lambda: np.concatenate([array, array], axis=-1),
        "reshaped": lambda: array.reshape(*array.shape[:-1], 2, -1),
        "other byte order": lambda: array.astype(array.dtype.newbyteorder()),
        "same bytes, other type": lambda: array.view(np.uint32 if array.itemsize == 4 else np.uint64),
        "wider type": lambda: array.astype(np.complex128),
        "object": lambda: array.astype(object),
        "no dimension": lambda: array.reshape(-1)[0].reshape(()),
        "tensor": lambda: torch.from_numpy(array),
        "list": array.tolist,
        "None": lambda: None,
    }[case]()


CASES = (
    "strided",
    "transposed",
    "shorter",
    "longer",
    "reshaped",
    "other byte order",
    "same bytes, other type",
    "wider type",
    "object",
    "no dimension",
    "tensor",
    "list",
    "None",
    "read-only",
)
SOUND_IF_ALL_HAVE_IT = ("shorter", "longer", "reshaped", "same bytes, other type", "wider type")
CALLS = {
    "bcast_vector": (np.float32, (24,), ["read-only on root"]),
    "reduce_sum": (np.int64, (24,), []),
    "sum_all": (np.float32, (24,), []),
    "gather_rows": (np.float32, (4, 6), ["read-only"]),
    "gather_counts": (np.int64, (24,), ["read-only", "shorter", "longer"]),
}


def transfer(net, call, array):
    return net.sum_all(array) if call == "sum_all" else getattr(tree, call)(net, array)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("where", ["root", "last", "all"])
def test_buffers_that_mpi_would_misread_are_refused_alike_on_every_rank(net, agree, call, where):
    dtype, shape, fine = CALLS[call]
    spoilt = {"root": net.is_server, "last": net.rank == net.size - 1, "all": True}[where]
    refused = [case for case in CASES if case not in fine and f"{case} on {where}" not in fine]
    for case in refused if where != "all" else [each for each in refused if each not in SOUND_IF_ALL_HAVE_IT]:
        array = np.arange(24, dtype=dtype).reshape(shape)
        raised = None
        try:
            transfer(net, call, unfit(case, array) if spoilt else array)
        except TransferError as error:
            raised = error
        told = on_every_rank(net, (str(raised), getattr(raised, "everywhere", False)))
        agree(told[0] == told[net.rank] and told[0][1], (case, told))
        named = {"root": "on rank 0", "last": f"on rank {net.size - 1}", "all": "on rank"}[where]
        agree(named in told[0][0] and told[0][0].startswith(f"{call}: the buffer is") and "wanted" in told[0][0], told)
    sound = np.ones(shape, dtype)
    transfer(net, call, sound)  # and the next one is right
    sums = call == "sum_all" or (call == "reduce_sum" and net.is_server)
    agree(not sums or (sound == net.size).all(), sound)


def test_scripts_call_the_same_as_methods(agree):
    own = PackageProcessor()
    vector = own.bcast_vector(np.full(3, own.rank))
    sums, every = np.full(3, own.rank), np.full(3, own.rank)
    own.reduce_sum(sums)
    own.sum_all(every)
    total = sum(range(own.size))
    agree((vector == 0).all() and (every == total).all() and (not own.is_server or (sums == total).all()))
    gathered = own.gather_counts(np.array([own.rank])), own.gather_rows(np.ones((1, 2), np.float32))
    agree([len(part) for part in gathered] == [own.size * own.is_server] * 2, gathered)
    agree(own.on_root(lambda: own.rank) == 0)
    agree(own.on_all(lambda: own.rank) == own.rank)
    agree(own.on_every_rank(own.rank) == list(range(own.size)))
    agree(own.same_everywhere({"a": own.rank, "b": 1}) == {"a": {rank: [rank] for rank in range(own.size)}})
    own.require_same({"b": 1})
    with pytest.raises(ConfigError, match="the mistake"):
        own.agree(ConfigError("the mistake"))
    half = own.split(own.rank % 2)
    agree(isinstance(half, PackageProcessor) and half.size == len(range(own.rank % 2, own.size, 2)))
    half.close()
    own.close()


@pytest.mark.parametrize("call", ["reduce_sum", "gather_rows", "gather_counts"])
def test_one_type_only_even_where_all_ranks_pass_another(net, call):
    with pytest.raises(TransferError, match=r"complex64 of shape .* on rank.*; wanted is .*(int64|float32) in"):
        transfer(net, call, np.zeros((2, 3), np.complex64))


def test_a_receiver_notices_that_less_or_more_has_come(net, agree):
    for sent in (7, 9):
        said = ""
        if net.rank == net.size - 1:
            net.send(np.zeros(sent, np.float32), 0)
        if net.is_server:
            with pytest.raises(TransferError) as caught:
                net.receive(np.zeros(8, np.float32), net.size - 1)
            said = str(caught.value)
        agree(
            not net.is_server or said.startswith(f"rank {net.size - 1} sent {28 if sent == 7 else 'more'} bytes"), said
        )


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        "no order",
        {"cohort": np.array([1.5])},
        {"cohort": np.array([[1]])},
        {"cohort": np.arange(2)},
        {"integer_state": np.empty(0)},
        {"ranks": [1]},
    ],
)
def test_an_order_that_cannot_be_sent_is_refused_alike(net, agree, wrong):
    sent = dataclasses.replace(order(ranks=(1,)), **wrong) if isinstance(wrong, dict) else wrong
    with pytest.raises(TransferError, match="bcast_order: rank 0 passed") as caught:
        bcast_order(net, sent if net.is_server else None)
    agree(caught.value.everywhere)
    narrow = dataclasses.replace(order(ranks=(1,)), cohort=np.array([10], np.int32))
    got = bcast_order(net, narrow if net.is_server else None)
    agree(got.cohort.tolist() == [10] and got.cohort.dtype == np.int64, got)
