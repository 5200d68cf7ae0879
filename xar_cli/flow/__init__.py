"""Flow matching: the interpolant, timesteps of the context, guidance and the solvers. Pure functions of tensors."""
