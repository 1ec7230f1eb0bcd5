"""What surrounds a run: configuration, command line, processes, log."""
