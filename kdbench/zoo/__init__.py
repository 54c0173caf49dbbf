"""Networks and data sets that ship with kdbench, registered by entry point like anybody's."""
