"""The processes of a run: rank and world size, rendezvous, process groups, heartbeats, watchdog and signals."""
