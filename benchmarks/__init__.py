"""What the objective's core costs in time and memory, beside what else does the same work.

Where it fits: beside the package, which does not know of it. In: sizes, or nothing. Out: tables on
the screen, JSON files under `results/`, and the tables of this folder's README made from them
(`python -m benchmarks`). `measure` holds clocks, memory and processes; `contenders` what is
compared; `vocab_parallel`, `training_memory`, `generation` and `objective_cost` are the benchmarks.
"""
