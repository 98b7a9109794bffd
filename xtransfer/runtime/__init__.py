"""What a process runs on: the terminal, other processes, the cluster, preemption, sharding, and locks."""
