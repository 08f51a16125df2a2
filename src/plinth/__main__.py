"""`python -m plinth` is the command `plinth`."""

from plinth.cli.main import entry

entry()
