"""Benchmarks. ADD A BENCHMARK: one file with HELP, add_arguments(parser), run(args) and show(result).

A file imports torch inside its functions: the command line lists all of them on every call.
"""
