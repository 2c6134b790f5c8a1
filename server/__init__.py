"""The coordinator's door: the ServerApp, its round loop, and the run folder it writes."""
