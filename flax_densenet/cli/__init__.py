"""The command line: `main` runs one of `commands.COMMANDS`, one file per command."""
