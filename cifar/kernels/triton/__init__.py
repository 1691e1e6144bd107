"""cifar.kernels.triton."""
