"""Many trials of one run, over ranges of its settings: grid, random, coarse to fine, and stopped early."""
