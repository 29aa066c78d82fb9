"""How far statistics drift: measures, their monitor, and the record of a run."""
