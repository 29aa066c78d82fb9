"""Many runs that answer one question: rows times seeds, learning rates tuned, a table, a figure, and claims checked."""
