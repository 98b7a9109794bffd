"""What a process runs on: terminal, other processes, cluster, preemption, sharding, and locks."""
