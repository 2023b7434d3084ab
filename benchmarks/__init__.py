"""`make bench`: how fast and how small, each figure beside a reference of the same run.

A module a row: start (a), create (b), exits (c), boot (d), memory (e), blk (f), net (g).
See docs/benchmarks.md.
"""
