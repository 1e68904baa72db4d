"""The native engine: integer programs compiled to a small binary format and run by portable C kernels."""

from arqsearch.integer.native.plan import NativeProgram, compile_program

__all__ = ["NativeProgram", "compile_program"]
