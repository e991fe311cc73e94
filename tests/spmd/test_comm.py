from __future__ import annotations

import dataclasses
import socket

import numpy as np
import pytest
import torch

from fedmpi import PackageProcessor
from fedmpi.core.exchange import LocalWork, bcast_order, collect
from fedmpi.core.order import ClientUpdate, Collect, MessageCode, Order
from fedmpi.core.segments import Layout
from fedmpi.core.sums import UpdateSums
from fedmpi.errors import ConfigError, DisagreementError, TransferError
from fedmpi.mpi import comm as comm_module
from fedmpi.mpi import tree
from fedmpi.mpi.setup import on_all, on_every_rank, on_root, require_same
from fedmpi.mpi.tree import bcast_vector, gather_rows, reduce_sum, sum_bins

STATE = np.arange(3)
LAYOUT = Layout(4, 0)
SENT = [torch.zeros(4)]


def order(code=MessageCode.PARAMETER_UPDATE, ranks=(), collect=Collect.SUM, block_bytes=2**24):
    cohort = np.arange(10, 10 + len(ranks))
    weights = cohort - 3
    return Order(
        code, 7, 1, 2, collect, exit_code=5, block_bytes=block_bytes, cohort=cohort, ranks=np.array(ranks, np.int64),
        groups=np.arange(len(ranks)), weights=weights, unit_max=np.array([weights.max(initial=0)]), integers=STATE,
    )  # fmt: skip


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


def test_sums_of_which_only_one_rank_opened_a_bin(net, agree):
    sums = [np.full(4, net.rank), *([np.full(4, 100)] if net.rank == 1 else [])]

    def grow(num_bins):
        return sums + [np.zeros(4, np.int64) for _ in range(num_bins - len(sums))]

    sum_bins(net, sums, grow)
    total = [[sum(range(net.size))] * 4, [100 if net.size > 1 else 0] * 4]
    agree(not net.is_server or [one.tolist() for one in sums] == total[: len(sums)], sums)
    agree(not net.is_server or net.size == 1 or len(sums) == 2, sums)


def test_collect_a_sum_with_a_bin_that_only_one_rank_opened(net, agree):
    """Client 10 + r moves by r, and by 2^10, which needs bin 1, on rank 1; weights are 7 + r."""
    ranks = range(min(1, net.size - 1), net.size)
    sent = order(ranks=ranks)
    work = LocalWork(sums=UpdateSums(LAYOUT, SENT, sent), integers=STATE + net.rank if net.rank in ranks else STATE[:0])
    if net.rank in ranks:
        client_id = 10 + list(ranks).index(net.rank)
        moved = np.float32(2**10 if net.rank == 1 else net.rank)
        finite = work.sums.add(client_id, torch.full((4,), float(moved)))
        work.updates.append(ClientUpdate(client_id, net.rank, 0.5, 0.25, int(finite), {"h": net.rank / 3}))
    arrived = collect(net, sent, work)
    if not net.is_server:
        agree(not arrived.updates and not arrived.busy_s, arrived)
        return
    clients = [10 + i for i in range(len(ranks))]
    total = sum((7 + i) * (2**10 if rank == 1 else rank) for i, rank in enumerate(ranks))
    ok = arrived.sums.total(0).w.tolist() == [total] * 4
    ok &= [(u.client_id, u.finite, u.reported) for u in arrived.updates] == [
        (client, 1, {"h": rank / 3}) for client, rank in zip(clients, ranks, strict=True)
    ]
    ok &= arrived.busy_s == {rank: 0.25 if rank in ranks else 0 for rank in range(net.size)}
    ok &= arrived.integers.tolist() == (STATE + net.size - 1).tolist()
    agree(ok, arrived)


@pytest.mark.parametrize("block_bytes", [1, 8, 2**24])
def test_collect_rows_in_blocks_of_bounded_size(net, agree, block_bytes):
    ranks = range(min(1, net.size - 1), net.size)
    sent = order(
        ranks=list(reversed(ranks)), collect=Collect.ROWS, block_bytes=len(ranks) * block_bytes
    )  # the last rank has client 10
    rows, mine = [], []
    if net.rank in ranks:
        rows = [np.arange(4, dtype=np.float32) + 10 * net.rank]
        mine = [ClientUpdate(10 + net.size - 1 - net.rank, 1, 0.5, 0.1)]
    work = LocalWork(mine, UpdateSums(LAYOUT, SENT, sent), rows, row_size=4, integers=STATE)
    arrived = collect(net, sent, work)
    blocks = list(arrived.blocks)
    if not net.is_server:
        agree(not blocks, blocks)
        return
    columns = [(c.start, c.stop) for c, _ in blocks]
    whole = np.concatenate([block for _, block in blocks], 1)
    want = np.stack([np.arange(4) + 10 * rank for rank in reversed(ranks)])
    wanted = {1: [(0, 1), (1, 2), (2, 3), (3, 4)], 8: [(0, 2), (2, 4)], 2**24: [(0, 4)]}[block_bytes]
    agree(columns == wanted and np.array_equal(whole, want), (columns, whole))


def test_rows_of_an_empty_cohort_are_no_blocks(net, agree):
    sent = order(collect=Collect.ROWS)
    arrived = collect(net, sent, LocalWork(sums=UpdateSums(LAYOUT, SENT, sent), row_size=4))
    agree(next(arrived.blocks, None) is None)
    agree(net.max_of(net.rank) == net.size - 1, "no message is left over")


def test_collect_numbers_alone(net, agree):
    before = net.bytes_sent
    mine = [ClientUpdate(10 + net.rank, 1, 0.5, 0.1, 1, {"loss": float(net.rank)})] if net.rank else []
    arrived = collect(net, order(ranks=range(1, net.size), collect=Collect.NUMBERS), LocalWork(mine))
    told = [update.reported["loss"] for update in arrived.updates]
    agree(told == (list(range(1, net.size)) if net.is_server else []), told)
    agree(net.bytes_sent == before, "no vector")


def test_collect_metrics_are_summed(net, agree):
    work = LocalWork(metrics=np.array([1, net.rank, 2, 0]), stop=15 if net.rank == net.size - 1 else 0)
    arrived = collect(net, order(MessageCode.EVALUATE_PARAMS), work)
    total = [net.size, sum(range(net.size)), 2 * net.size, 0]
    agree(not net.is_server or arrived.metrics.tolist() == total, arrived)
    agree(not net.is_server or arrived.signals == [(net.size - 1, 15)], arrived)


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
        {"groups": np.arange(2)},
        {"weights": np.arange(3)},
        {"send_idx": np.arange(2)},
        {"integers": np.empty(0)},
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
