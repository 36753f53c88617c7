"""How fast each path is, as a fraction of what the machine can do, and against the tools users would pick instead."""
