"""What lets other libraries use this one as if it were theirs; each needs its own library and is imported by name."""
