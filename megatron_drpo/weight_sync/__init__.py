"""Weight sync: the trainer's new weights into the servers that generate.

Where it fits: L2. In: the policy's chunks, in any layout, and the servers. Out: servers that hold a
known version of the weights, and the names of those that do not. `sync` is the trainer's side;
`receiver`, `group` and `vllm_worker` also run in a server, whose environment has torch and little
else: they import nothing beyond it.
"""
