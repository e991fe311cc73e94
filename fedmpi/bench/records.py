"""Records of rounds, for a benchmark."""

from __future__ import annotations

from fedmpi.core.record import RoundRecord
from fedmpi.core.server_loop import ServerHalf


class Records(list[RoundRecord]):
    """Keeps the records of all rounds, on the server."""

    def on_round(self, record: RoundRecord) -> None:
        """One more."""
        self.append(record)

    def on_end(self, handler: ServerHalf) -> None:
        """Nothing."""
