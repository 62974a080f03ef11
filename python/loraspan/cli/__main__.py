"""``python -m loraspan.cli``."""

from loraspan.cli import main

main(prog_name="loraspan")
