"""How a layer multiplies: packed for the CPU's kernels, quantised, or joined with others."""
