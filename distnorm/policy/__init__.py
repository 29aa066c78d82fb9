"""Who shares statistics? `decide` answers with a `NormSpec`: integers, thresholds, evidence, reasons. No torch.

`case` holds what was asked and what the ranks can reach, `rows` the table of decisions (first match wins), `requests`
the answers to a kind or an exact number, `layers` the overrides of single layers, `statistics` the momentum and what
evaluation uses, `prices` penalty, cost and alternatives, `table` the printed decision.
"""

from distnorm.policy.case import TASKS as TASKS
from distnorm.policy.case import suggest as suggest
from distnorm.policy.decision import decide as decide
from distnorm.policy.table import render as render
