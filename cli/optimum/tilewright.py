"""The command `optimum-cli export tilewright`, the same as `tilewright export build`.

Every `optimum-cli` command loads this file, so it imports nothing that is not loaded already.
"""

import argparse
import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

__all__ = ["REGISTER_COMMANDS"]


class TilewrightCommand(BaseOptimumCLICommand):
    """Hands all of its words to `tilewright export build`."""

    COMMAND = CommandInfo("tilewright", "Build a Tilewright bundle: the same as `tilewright export build`.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Take every word as it is, options and --help too."""
        parser.prefix_chars = ""
        parser.add_argument("words", nargs=argparse.REMAINDER)

    def run(self) -> None:
        """Build."""
        from tilewright.cli.main import main

        sys.argv = ["tilewright", "export", "build", *self.args.words]
        sys.exit(main())


REGISTER_COMMANDS = [(TilewrightCommand, ExportCommand)]
