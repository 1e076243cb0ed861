"""A run on paper: what a model, a configuration and a number of ranks come to.

Where it fits: L2. Pure functions over `Architecture`, `Config` and the number of ranks; no process
group, no megatron, no file. `preflight` asks whether a layout is possible (`layouts`); `--dry-run`
and the doctor print what it takes: parameters (`sizes`), bytes (`memory`), messages
(`traffic`) and time (`speed`), with warnings where settings are allowed but odd (`advice`).
"""
