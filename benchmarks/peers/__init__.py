"""The tools users would pick instead: the obvious torch script, and mergekit in an environment of its own."""
