"""The command line: one file per command, arguments to calls to text."""
