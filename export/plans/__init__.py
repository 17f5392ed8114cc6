"""TensorRT's plans: compiled for one kind of GPU, from a component's graph and its mapped weights."""
