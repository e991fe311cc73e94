"""Every random number comes from (seed, stream, round, client), so the number of ranks cannot change it."""

from __future__ import annotations

import random
from enum import IntEnum
from hashlib import blake2b

import numpy as np


class Stream(IntEnum):
    """Purpose of a generator; two streams never share numbers."""

    INIT = 0  # initial weights
    COHORT = 1  # which clients take part in a round
    BATCHES = 2  # order of a client's samples
    CLIENT = 3  # whatever else a client's training draws (dropout, a user's own code)
    EVALUATION = 4  # what a user's model draws while it is evaluated; by chunk of the test set
    PURPOSE = 5  # what an author names, for a client
    SERVER = 6  # what an author names, for the server


def derive_seed(
    seed: int, stream: Stream, round_idx: int = 0, client_id: int = 0, exchange_idx: int = 0, purpose: str = ""
) -> int:
    """A 63-bit seed for one purpose.

    Args:
        seed: the run's seed, >= 0.
        stream: the purpose.
        round_idx: the round, 0 where there is none.
        client_id: the client, 0 where there is none.
        exchange_idx: the exchange of the round; the first leaves the seed as it is without.
        purpose: an author's word for it.
    """
    text = f"{seed},{int(stream)},{round_idx},{client_id}"
    text += f",{exchange_idx}" * (exchange_idx > 0) + f";{purpose}" * bool(purpose)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seed_everything(seed: int) -> None:
    """Set the global generators of Python, NumPy and torch, for code that draws from those."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  # the legacy global generator is the very thing to set
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a hundred times longer, on devices not in use
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it untyped
        torch.cuda.manual_seed_all(seed)
