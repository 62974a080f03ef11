"""The folder on disk: format, transactions, verification."""
