"""Data: text sources, preparation into token shards, and reading the shards."""
