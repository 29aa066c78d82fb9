"""Open threads of torch and its neighbours, each settled on two ranks; docs/threads.md lists the same ones."""

import ast
import re

import pytest

import distnorm
from tests import ranks, threads, threads_conversion, threads_graphs, threads_statistics, threads_training
from tests.runs import ROOT

pytestmark = pytest.mark.unit

CASES = threads.cases_of(threads_conversion, threads_graphs, threads_training, threads_statistics)


@pytest.mark.parametrize("body", CASES, ids=lambda body: f"{body.__name__}-{'-'.join(CASES[body])}")
def test_a_thread_is_settled_on_two_ranks(body):
    ranks.run(body, world=2)


PAGE = (ROOT / "docs" / "threads.md").read_text()
LINK = re.compile(r"\[[\w.-]+#(\d+)\]\(https://github\.com/([\w.-]+/[\w.-]+)/(?:issues|pull)/\1\)")
ROWS = [line.split(" | ") for line in PAGE.splitlines() if line.startswith("| [")]


def test_the_page_has_one_row_per_case():
    listed = [tuple(f"{repository}#{number}" for number, repository in LINK.findall(row[0])) for row in ROWS]
    assert listed == list(CASES.values())


def test_every_link_is_a_thread_of_its_name():
    assert len(LINK.findall(PAGE)) == PAGE.count("](http") == len({t for threads_ in CASES.values() for t in threads_})


def test_the_pages_code_parses_and_calls_what_there_is():
    theirs = {"Trainer", "DistributedDataParallel", "checkpoint", "fully_shard", "fuse_modules_qat", "branch", "model"}
    theirs |= {"vmap", "symbolic_trace"}
    for row in ROWS:
        nodes = ast.walk(ast.parse(re.fullmatch(r"`(.*)` \|", row[3])[1]))
        calls = [node.func for node in nodes if isinstance(node, ast.Call)]
        names = {call.id for call in calls if isinstance(call, ast.Name)}
        assert names <= {*vars(distnorm), "LayerSync", "BatchRenorm", *theirs}, row
