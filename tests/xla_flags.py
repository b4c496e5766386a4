"""XLA_FLAGS of programs that tests start; conftest.py sets those of the tests' own process."""

# One CPU device, as a user has it. Programs run briefly once compiled: LLVM need not polish them.
ONE_DEVICE = "--xla_backend_optimization_level=0"
