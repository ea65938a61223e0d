"""Rows whose classes are sharded across ranks: a backend built from that of one shard, and the
merge."""
