"""Studies: the design's words, the choice of rates, the table, the claims, the workers, and a whole one by train.py."""

import csv
import json
import math
import os
import re

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from distnorm.convert import normalization_layers
from distnorm.errors import ConfigError
from distnorm.launch import entry
from distnorm.launch.compose import composed as compose
from distnorm.launch.run_dir import RunFolder
from distnorm.study import claims, design, figure, measure
from distnorm.study.cells import Cell, Outcome, Outcomes, Plan
from distnorm.study.table import Table
from distnorm.study.workers import CellError, Workers
from tests import runs

CONF = runs.ROOT / "conf" / "train.yaml"
EXPERIMENTS = sorted(file.stem for file in (runs.ROOT / "conf" / "experiment").glob("*.yaml"))
STUDIES = [e for e in EXPERIMENTS if "\nstudy:" in (runs.ROOT / "conf" / "experiment" / f"{e}.yaml").read_text()]
FIGURE = {"title": "t", "panels": [{"y": "loss", "column": "train_loss"}]}
unit = pytest.mark.unit


def asked(rows, **others):
    return design.read({"seeds": [0, 1], "rows": rows, "figure": FIGURE, **others})


def a_table(numbers, **others):
    """Rows → column → one value a seed."""
    made = asked({name: {"set": []} for name in numbers}, **others)
    outcomes = [
        Outcome(row, seed, None, {column: values[seed] for column, values in columns.items()})
        for row, columns in numbers.items()
        for seed in range(len(next(iter(columns.values()))))
    ]
    return made, Table(made, outcomes)


def message_of(call, *arguments):
    with pytest.raises(ConfigError) as error:
        call(*arguments)
    assert str(error.value).count("\n") <= 2
    return str(error.value)


@unit
@pytest.mark.parametrize(
    ("node", "value", "remedy"),
    [
        ({"seedz": [1]}, "study.seedz=[1]", "Did you mean 'seeds'?"),
        ({"rows": {"a": {"sett": []}}}, "study.rows.a", "experiment/"),
        ({"rows": {}}, "study.rows={}", "Give study.rows such a value"),
        ({"workers": 0}, "study.workers=0", "Give study.workers such a value"),
        ({"probes": {"p": {"statistics": "pooling"}}}, "study.probes.p.statistics='pooling'", "'pooled'"),
        ({"figure": None}, "study.figure=None", "Give study.figure"),
        (
            {"claims": [{"says": "s", "rule": "falls", "values": ["b/x", "row/x"]}]},
            "study.claims.values='b' is no row",
            "Its rows: row",
        ),
        ({"rows": {"row": {"set": [], "against": "roww"}}}, "study.rows.row.against='roww'", "Did you mean 'row'?"),
        ({"tune": {"grid": [1.0], "rows": {"s": ["roww"]}}}, "study.tune.rows.s='roww'", "Did you mean 'row'?"),
    ],
)
def test_a_design_that_is_wrong_is_refused_with_the_key_and_the_remedy(node, value, remedy):
    text = message_of(design.read, {"seeds": [0], "rows": {"row": {"set": []}}, "figure": FIGURE, **node})
    assert value in text
    assert remedy in text


@unit
def test_a_missing_part_is_named():
    assert "study.figure is missing" in message_of(design.read, {"seeds": [0], "rows": {"row": {"set": []}}})


@unit
def test_the_table_has_means_and_standard_errors_over_the_seeds(tmp_path):
    losses, errors = [0.5, 0.7, 0.9], [10.0, 12.0, 11.0]
    made, table = a_table(
        {"BN 2": {"train_loss": losses, "test_error": errors}, "GN": {"train_loss": [0.25]}}, seeds=[0, 1, 2]
    )
    found = table.of("BN 2", "test_error")
    assert found.value == pytest.approx(np.mean(errors))
    assert found.error == pytest.approx(np.std(errors, ddof=1) / np.sqrt(3))
    assert math.isnan(table.of("GN", "train_loss").error)
    assert math.isnan(table.at("GN/test_error").value)
    read = {row["row"]: row for row in csv.DictReader(table.csv().splitlines())}
    assert float(read["BN 2"]["train_loss"]) == pytest.approx(0.7)
    assert float(read["BN 2"]["test_error_se"]) == pytest.approx(np.std(errors, ddof=1) / np.sqrt(3), rel=1e-5)
    assert read["GN"]["test_error"] == ""
    assert (read["BN 2"]["runs"], read["GN"]["runs"]) == ("3", "1")
    assert "| BN 2 | 3 | 0.700 ± 0.115 | 11.0 ± 0.577 |" in table.markdown()
    assert "| GN | 1 | 0.25 | – |" in table.markdown()
    assert re.search(r"^BN 2 +3 +0\.700 ± 0\.115 +11\.0 ± 0\.577$", table.text(), re.MULTILINE)
    svg, png = figure.draw(made, table, tmp_path)
    assert "<svg" in svg.read_text()
    assert png.read_bytes().startswith(b"\x89PNG")
    assert png.stat().st_size < 60_000


@unit
def test_bars_are_as_high_as_the_numbers(tmp_path, monkeypatch):
    heights = []
    from matplotlib.axes import Axes

    drawn = Axes.bar

    def note(self, place, height, *others, **options):
        heights.append((height, options["yerr"]))
        return drawn(self, place, height, *others, **options)

    monkeypatch.setattr(Axes, "bar", note)
    bars = {"left": {"one": "a/x"}, "right": {"one": "b/x"}}
    made, table = a_table(
        {"a": {"x": [1.0, 3.0]}, "b": {"x": [5.0]}}, figure={"title": "t", "panels": [{"y": "x", "bars": bars}]}
    )
    figure.draw(made, table, tmp_path)
    assert heights == [(2.0, pytest.approx(1.0)), (5.0, None)]


@unit
@pytest.mark.parametrize(
    ("rule", "numbers", "by", "holds", "said"),
    [
        ("falls", [0.66, 0.61, 0.55], 1, True, "(0.66 > 0.61 > 0.55)"),
        ("falls", [0.66, 0.55, 0.55], 1, False, "(0.66 > 0.55 ≤ 0.55)"),
        ("falls", [75, 15], 2, True, "(75 > 2 × 15)"),
        ("falls", [29, 15], 2, False, "(29 ≤ 2 × 15)"),
        ("falls", [1.0, math.nan], 1, False, "(1 ? nan)"),
        ("within", [0.50, 0.51], 0.02, True, "(0.5, 0.51; differ by at most 0.02)"),
        ("within", [0.50, 0.53, 0.51], 0.02, False, "differ by at most 0.02"),
        ("within", [math.nan, 0.5], 0.02, False, "nan"),
        ("below", [1e-12], 1e-9, True, "(1e-12; at most 1e-09)"),
        ("below", [1e-12, 1e-8], 1e-9, False, "at most 1e-09"),
        ("below", [math.inf], 1e-9, False, "inf"),
    ],
)
def test_a_claim_holds_or_does_not(rule, numbers, by, holds, said):
    values = [f"row/{i}/x{i}" for i in range(len(numbers))]
    made, table = a_table({f"row/{i}": {f"x{i}": [number]} for i, number in enumerate(numbers)})
    claim = design.Claim(says="so it is", rule=rule, values=values, by=by)
    verdict = claims.check(claim, table)
    assert verdict.holds is holds
    assert str(verdict).startswith("yes  so it is" if holds else "no  so it is")
    assert said in str(verdict)
    relaxed = claims.check(claim.model_copy(update={"asserted": False}), table)
    assert ("(not asserted)" in str(relaxed)) is not holds


SMALL = ["model=convnet", "trainer=cpu", "drift=none", "logger.mode=disabled", "trainer.max_steps=2"]


def plan_of(rows, **others):
    return Plan(asked(rows, **others), lambda changes: compose(CONF, [*SMALL, *changes]))


@unit
def test_a_series_takes_the_rate_with_the_lowest_validation_loss_summed_over_its_rows():
    rows = {
        "b2": {"series": "B", "set": ["norm=ghost", "norm.normalization_batch=2"]},
        "b8": {"series": "B", "set": ["trainer.accumulate_grad_batches=4"]},
        "g": {"set": ["norm=group"]},
        "h": {"set": []},
    }
    tune = {"grid": [0.01, 0.1], "rows": {"B": ["b2", "b8"], "g": ["g"]}}
    plan = plan_of(rows, tune=tune, seeds=[4, 5])
    tuning = plan.tuning()
    assert [(c.row, c.seed, c.rate) for c in tuning] == [(r, 4, x) for r in ("b2", "b8", "g") for x in (0.01, 0.1)]
    assert [c.settings.optimizer["lr"] for c in tuning] == [0.01, 0.1] * 3
    losses = {("b2", 0.01): 1.0, ("b2", 0.1): 0.8, ("b8", 0.01): 1.0, ("b8", 0.1): 1.3, ("g", 0.01): math.nan}
    outcomes = [Outcome(row, 4, rate, {"val_loss": loss}) for (row, rate), loss in losses.items()]
    outcomes.append(Outcome("g", 4, 0.1, {"val_loss": 2.0}))
    rates = plan.choose(outcomes)
    assert rates == {"b2": 0.01, "b8": 0.01, "g": 0.1}
    final = plan.final(rates)
    assert {(c.row, c.seed): c.settings.optimizer["lr"] for c in final} == {
        (row, seed): rate for row, rate in (*rates.items(), ("h", 0.1)) for seed in (4, 5)
    }
    assert [c.row for c in final[:2]] == ["b8", "b8"], "the longest come first"
    assert {(c.settings.seed, c.settings.data["seed"]) for c in final} == {(4, 4), (5, 5)}
    assert plan.choose([Outcome(c.row, 4, c.rate, {}, error="no") for c in tuning])["g"] in (0.01, 0.1)


@unit
def test_a_row_that_cannot_be_composed_is_named():
    text = message_of(lambda: plan_of({"good": {"set": []}, "bad": {"set": ["norm=snyc"]}}))
    assert text.startswith("study.rows.bad: ")
    assert "Did you mean 'sync'?" in text
    text = message_of(lambda: plan_of({"bad": {"set": ["data.device_batch=-1"]}}))
    assert text.startswith("study.rows.bad: data.device_batch=-1")


@unit
def test_what_was_done_with_the_same_settings_is_not_done_again(tmp_path):
    settings = compose(CONF, SMALL).with_batches(1)
    cell = Cell("BN 2 × 2", 3, 0.1, settings, 1)
    assert re.fullmatch(r"[\w.+-]+_lr0\.1_seed3", cell.name)
    folder = cell.folder(tmp_path)
    folder.path.mkdir(parents=True)
    folder.write_settings(settings)
    Outcomes(tmp_path).add(cell, Outcome(cell.row, 3, 0.1, {"train_loss": 0.5}))
    with (tmp_path / "cells.jsonl").open("a") as file:
        file.write('{"cell": "half a li')
    known = Outcomes(tmp_path)
    assert known.find(cell).values == {"train_loss": 0.5}
    other = Cell(cell.row, 3, 0.1, settings.model_copy(update={"seed": 9}), 1)
    assert known.find(other) is None
    known.add(cell, Outcome(cell.row, 3, 0.1, {}, error="it failed"))
    assert known.find(cell) is None


@unit
def test_the_record_gives_the_last_tenth_and_the_largest_difference(tmp_path):
    folders = []
    for name, shift in (("a", 0.0), ("b", 0.25)):
        run = RunFolder(tmp_path / name)
        run.path.mkdir()
        rows = [{"step": step, "time": 0, "train/loss": step + shift * (step == 30)} for step in range(10, 110, 10)]
        rows += [{"step": 50, "time": 0, "drift/worst/between_ranks": 7.0}, {"step": 90, "time": 0, "val/loss": 1.0}]
        run.record.write_text("\n".join(map(json.dumps, [{"schema": 1}, *rows])))
        folders.append(run)
    assert measure.of_record(folders[0]) == {"train_loss": 100.0, "between_ranks": 7.0}
    assert measure.largest_difference(*folders) == 0.25


def _square_or_end(task):
    if task == "die":
        os._exit(7)
    if task == "raise":
        raise ZeroDivisionError("by nothing")
    return task * task


@unit
def test_a_worker_that_raises_or_dies_takes_nothing_with_it():
    workers = Workers(_square_or_end, 2)
    found = dict(workers.run([1, "die", 2, "raise", 3]))
    assert {task: found[task] for task in (1, 2, 3)} == {1: 1, 2: 4, 3: 9}
    assert isinstance(found["die"], CellError)
    assert "exit code 7" in str(found["die"])
    assert "ZeroDivisionError: by nothing (test_study.py:" in str(found["raise"])
    workers.stop()


@unit
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_base_of_every_experiment_runs(experiment, tmp_path):
    base = [f"experiment={experiment}", "study=null"]
    world = runs.composed(*base).trainer.devices
    result, _ = runs.in_pool(tmp_path / "run", world, *base)
    assert result["world_size"] == world
    assert 0 <= result["metrics"]["test/accuracy"] <= 1


@unit
@pytest.mark.parametrize("experiment", STUDIES)
def test_every_study_is_good_in_all_its_rows(experiment):
    made = design.read(runs.composed(f"experiment={experiment}").study)
    plan = Plan(made, lambda changes: compose(CONF, [f"experiment={experiment}", *changes, "study=null"]))
    final = plan.final({})
    assert {cell.row for cell in final} == set(made.rows)
    assert len({cell.name for cell in final}) == len(final)
    assert any(claim.asserted for claim in made.claims)
    assert {cell.settings.logger.mode for cell in final} == {"disabled"}


@unit
def test_a_study_is_no_job_of_a_sweep():
    settings = runs.composed("experiment=sorted_shards")
    with pytest.raises(ConfigError, match="Leave out -m"):
        entry._sweep(None, [(OmegaConf.create(settings.model_dump()), [])])


STUDY = (
    "study={seeds: [0, 1], keep: true, rows: {"
    "one: {series: s, at: 2, set: ['norm=ghost', 'norm.normalization_batch=2']},"
    "two: {seeds: [0], against: ref, set: ['norm=sync', 'trainer.devices=2', 'data.device_batch=4']},"
    "ref: {set: ['norm=batch']},"
    "bad: {seeds: [0], set: ['optimizer.momentum=-1']}},"
    "probes: {own: {statistics: first_rank}, batch: {statistics: batch}, dark: {data: {domain: inverted}}},"
    "tune: {grid: [0.1, 10.0], rows: {s: [one]}},"
    "figure: {title: t, panels: [{y: loss, column: train_loss}]},"
    "claims: [{says: it trains, rule: below, values: ['one/train_loss'], by: 100},"
    "{says: ranks change nothing, rule: below, values: ['two/largest_difference'], by: 1e-5}]}"
)


@pytest.mark.slow
@pytest.mark.run
def test_a_study_by_train_py_leaves_all_its_numbers_and_names_the_run_that_failed(tmp_path):
    changes = [*SMALL, "data.device_batch=8", "trainer.log_every_n_steps=1", "norm.evaluation=running"]
    done, folder = runs.train_py(*changes, STUDY, folder=tmp_path, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 runs failed, first: bad, seed 0: ValueError: Invalid momentum value: -1" in done.stderr
    study = folder.path
    read = {row["row"]: row for row in csv.DictReader((study / "table.csv").read_text().splitlines())}
    assert [int(read[name]["runs"]) for name in ("one", "two", "ref", "bad")] == [2, 1, 2, 0]
    written = [json.loads(line) for line in (study / "cells.jsonl").read_text().splitlines()]
    assert len(written) == 2 + 6 - 1, "the tuned run of the first seed is not run again"
    losses = [w["values"]["train_loss"] for w in written if w["row"] == "one" and w["rate"] == 0.1]
    assert len(losses) == 2
    assert float(read["one"]["train_loss"]) == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(read["two"]["largest_difference"]) < 1e-5
    assert float(read["ref"]["own"]) == float(read["ref"]["test_error"])
    assert 0 < float(read["ref"]["batch"]) <= 100
    assert read["one"]["rate"] == "0.1"
    about = json.loads((study / "study.json").read_text())
    assert [claim["holds"] for claim in about["claims"]] == [True, True]
    assert about["command"].startswith("python ")
    assert "yes  ranks change nothing" in done.stdout
    for name in ("figure.svg", "figure.png", "table.txt", "table.md"):
        assert (study / name).stat().st_size
    assert f"| one | 0.1 | 2 | {np.mean(losses):.2f} ±" in (study / "table.md").read_text()


@unit
def test_measuring_leaves_the_statistics_as_they_were():
    from distnorm.models import ConvNet

    model = ConvNet().eval()
    before = {name: layer.running_mean.clone() for name, layer in normalization_layers(model)}
    with measure._batch_statistics(model, active=True):
        assert {layer.training for _, layer in normalization_layers(model)} == {True}
        first = model(torch.randn(8, 1, 12, 12))
    assert first.shape == (8, 10)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(layer.running_mean, before[name]) for name, layer in normalization_layers(model))
