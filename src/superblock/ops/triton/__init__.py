"""The Triton kernels, one concept a file, each with the launcher that sets its shapes and grid."""
