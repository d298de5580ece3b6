"""The native CPU kernels: C++ in csrc/, reached through ctypes."""
