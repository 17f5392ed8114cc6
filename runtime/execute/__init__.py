"""Run the nodes of a graph on devices: values, the queue of ready nodes, threads, faults."""
