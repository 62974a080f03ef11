"""The command line: one file per command, arguments to calls to text."""

from __future__ import annotations

import errno

import click

from loraspan._default_device import cpu_by_default
from loraspan.cli.absorb import absorb
from loraspan.cli.add import add
from loraspan.cli.compress import compress
from loraspan.cli.demo import demo
from loraspan.cli.doctor import doctor
from loraspan.cli.export import export
from loraspan.cli.gc import gc
from loraspan.cli.info import info
from loraspan.cli.log import log
from loraspan.cli.output import one_line
from loraspan.cli.project import project
from loraspan.cli.refit import refit
from loraspan.cli.remove import remove
from loraspan.cli.rename import rename
from loraspan.cli.replace import replace
from loraspan.cli.rollback import rollback
from loraspan.cli.verify import verify
from loraspan.errors import LoraspanError

__all__ = ["main"]

INTERRUPTED = 130


class _Commands(click.Group):
    """Turns what a user can mend into one line and exit code 1, and ends quietly when told to stop."""

    @cpu_by_default
    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except LoraspanError as error:
            raise click.ClickException(one_line(str(error))) from error
        except OSError as error:
            # click itself ends quietly where the reader of stdout has gone
            if error.errno == errno.EPIPE:
                raise
            raise click.ClickException(one_line(str(error))) from error
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="loraspan")
def main() -> None:
    """Keep a whole collection of LoRA adapters in one shared low-rank subspace.

    \b
    Start here:
      loraspan demo
      loraspan compress adapters/ -o team.span
      loraspan info team.span
      loraspan export team.span sql -o restored/
      loraspan add team.span new/legal

    Exit codes: 0 done, 1 an error (or, for verify and doctor, something found), 2 wrong usage.
    """


_MAKE = (compress, info, export, verify)
_CHANGE = (project, add, absorb, refit, remove, rename, replace)
_KEEP = (log, rollback, gc)
for _command in (*_MAKE, *_CHANGE, *_KEEP, demo, doctor):
    main.add_command(_command)
