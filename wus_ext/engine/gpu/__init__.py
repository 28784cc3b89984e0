"""What libraries for GPUs do beside our kernels: off by default."""
