"""What this machine is: processor, memory, compiled kernels, the faster dtype."""
