"""Device kernels and the numpy definition of each. Empty until the GPU work begins."""
