"""Arguments of the bench's programs: a mistake is one line, as everywhere."""

from __future__ import annotations

import argparse
from typing import NoReturn

from fedmpi.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Raises ConfigError where argparse would leave."""

    def error(self, message: str) -> NoReturn:
        """See the class."""
        raise ConfigError(f"{message}; see {self.prog} --help")
