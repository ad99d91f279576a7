"""phi4_kernels: the ops of a Phi-4 step, each with a reference, an implementation and its proof."""
