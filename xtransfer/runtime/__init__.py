"""The environment of a process: terminal, other processes, cluster, preemption, sharding, locks, and checksums."""
