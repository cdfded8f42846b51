"""Shards on a disk: built, indexed, read, verified, copied nearer."""
