"""What a run leaves: its folder, the record, and wandb's file; each readable after a kill."""

import json
import time

import pytest
from PIL import Image

from distnorm.drift import record, wandb_file
from distnorm.drift.history import EVENT
from distnorm.launch import run_dir
from distnorm.tracking import make_loggers
from distnorm.wandb_logger import DriftWandbLogger
from distnorm.wandb_media import Media
from tests import logged, told
from tests.runs import composed, wait_for

pytestmark = pytest.mark.unit


EXPECTED = [(10, 1 / 10, 0), (20, 1 / 20, 0), (30, 1 / 30, 0)]


def rows_of(rows):
    return [(r["trainer/global_step"], r["train/loss"], r["epoch"]) for r in rows if "train/loss" in r]


def test_online_without_a_key_both_have_every_number_and_event_and_one_warning_tells_the_remedy(tmp_path):
    with logged.start(tmp_path, "online") as process:
        printed = process.communicate(timeout=180)[0].splitlines()
    assert process.returncode == 0, printed
    warning, done = printed
    assert "logger.mode=online" in warning
    assert "Run `wandb login` first" in warning
    assert done == "logged False"  # what draws is not loaded before there is something to draw
    [path] = (tmp_path / "run").glob("wandb/offline-*/*.wandb")
    there = wait_for(lambda: (read := wandb_file.read(path)).has_ended and read)
    record_path = tmp_path / "run" / "record.jsonl"
    assert rows_of(there.rows) == EXPECTED
    assert [(row["step"], row["train/loss"], row["epoch"]) for row in record.read(record_path)] == EXPECTED
    about = record.load(record_path).about
    for kept in (there.config, about):
        assert kept["norm"]["kind"] == "sync"
        assert kept["norm"]["normalization_batch"] == 32
        assert kept["decision"].items() >= {"kind": "sync", "sync_ranks": 2, "normalization_batch": 32}.items()
        assert kept["decision"]["reasons"]
        assert kept["decision_layers"] == [{"name": "bn1", "was": "BatchNorm2d", "normalization_batch": None}]
    assert about["run"] == "run"
    told_there = [json.loads(row[EVENT]) for row in there.rows if EVENT in row]
    rows = record.load(record_path).rows
    assert told_there == [{k: v for k, v in row.items() if k != "time"} for row in rows if record.is_event(row)]
    kinds = [next(key for key in row if key != "step") for row in told_there]
    assert kinds == ["watched", "drift", "drift", "drift", "alarm", "snapshot"]


def test_at_the_end_wandb_has_pictures_and_a_table_of_layers(tmp_path):
    made = make_loggers(offline().logger, run_dir.RunFolder(tmp_path), {}, is_first=True)
    last = told.measured(50, keys=("jeffreys", "between_ranks", "lag"))
    last.values["lag"][1] = float("nan")
    for event in (told.watched("bn1", "bn2"), told.measured(10), last, told.alarm(50)):
        made[1].take(event)
    made[1].finalize("success")
    made[1].finalize("success")  # Lightning's second, after the test: nothing new
    logged.finish(made[1])
    [path] = tmp_path.glob("wandb/offline-*/*.wandb")
    [row] = [row for row in wandb_file.read(path).rows if "drift/layers.nrows" in row]
    assert row["trainer/global_step"] == 50
    table = json.loads((path.parent / "files" / row["drift/layers.path"]).read_text())
    values = {key: [float(v) for v in column] for key, column in last.values.items()}
    order = ["jeffreys", "between_ranks", "lag"]
    assert table["columns"] == ["layer", "kind", "channels", "samples", *order, "alarm"]
    assert table["data"] == [
        ["bn1", "BatchNorm2d", 8, 32, *(values[key][0] for key in order), "lag"],
        ["bn2", "BatchNorm2d", 8, 32, *(values[key][1] for key in order[:2]), None, ""],
    ]
    for key in ("jeffreys", "between_ranks"):
        picture = path.parent / "files" / row[f"drift/heatmap/{key}.path"]
        assert picture.stat().st_size < 20_000
        with Image.open(picture) as image:
            assert image.size == (row[f"drift/heatmap/{key}.width"], row[f"drift/heatmap/{key}.height"])
            assert len(image.getcolors()) > 10


def test_a_requeue_in_the_same_folder_goes_on_with_the_runs_id(tmp_path):
    run, ids = run_dir.RunFolder(tmp_path), []
    for _ in range(2):
        made = make_loggers(offline().logger, run, {}, is_first=True)
        ids.append(made[1].experiment.id)
        logged.finish(made[1])
        time.sleep(1)  # wandb names its folders by the second
    assert ids[0] == ids[1]
    assert {path.stem for path in tmp_path.glob("wandb/offline-*/*.wandb")} == {f"run-{ids[0]}"}
    assert len(list(tmp_path.glob("wandb/offline-*"))) == 2
    other = make_loggers(offline().logger, run_dir.RunFolder(tmp_path / "other"), {}, is_first=True)
    assert other[1].experiment.id != ids[0]
    logged.finish(other[1])


class Told:
    """Stands in for wandb's run online, which needs a network: it keeps what it is told, or fails."""

    def __init__(self, offline=False, error=None):
        self.offline, self.error, self.logged, self.alerts = offline, error, [], []

    def log(self, row):
        if self.error:
            raise self.error
        self.logged.append(row)

    def alert(self, **alert):
        self.alerts.append(alert)


@pytest.mark.parametrize("is_offline", [True, False])
def test_a_raised_alarm_is_an_alert_online(is_offline):
    run = Told(is_offline)
    logger = DriftWandbLogger(run)
    for event in (told.alarm(10), told.alarm(20, state="cleared")):
        logger.take(event)
    assert len(run.logged) == 2
    expected = {"title": "lag of the running mean in bn1", "text": told.alarm(10).message, "level": "WARN"}
    assert run.alerts == ([] if is_offline else [expected])


def test_a_failure_of_wandb_stops_nothing_and_is_told_once(caplog):
    logger = DriftWandbLogger(Told(error=ConnectionError("the service is gone")))
    for step in (10, 20):
        logger.take(told.measured(step))
        logger.log_metrics({"loss": 1.0}, step)
    logger.finalize("success")
    [warning] = [message for message in caplog.messages if "wandb failed" in message]
    assert "the service is gone" in warning
    assert "record.jsonl has it all" in warning


def test_on_a_long_run_wandb_gets_fewer_and_fewer_measurements_and_the_last():
    run = Told()
    logger = DriftWandbLogger(run)
    logger.take(told.watched("bn1", "bn2"))
    for step in range(1, 4204):
        logger.take(told.measured(step, keys=("lag",)))
    logger.finalize("success")
    rows = [json.loads(row[EVENT]) for row in run.logged if EVENT in row]
    steps = [row["step"] for row in rows if "drift" in row]
    assert steps[:1000:250] == [1, 251, 501, 751]
    assert [steps[i + 1] - steps[i] for i in (1000, 1400, 1700, 1900, 2010)] == [2, 2, 4, 4, 8]
    assert steps[-1] == 4203
    assert len([row for row in run.logged if "drift/layers" in row]) == 5  # after 100, 300, 900, 2700, and at the end


def test_rare_measurements_are_thinned_by_themselves():
    run = Told()
    logger = DriftWandbLogger(run)
    for step in range(1, 2201):
        logger.take(told.measured(step, keys=("lag",)))
        if step % 200 == 0:
            logger.take(told.measured(step, keys=("shift",)))
    logger.finalize("success")
    rows = [json.loads(row[EVENT]) for row in run.logged if EVENT in row]
    of = {
        key: [row["step"] for row in rows if key in row.get("drift", {}).get("values", {})] for key in ("shift", "lag")
    }
    assert of["shift"] == [*range(200, 2201, 200)]
    assert of["lag"][:1001] == [*range(1, 1002)]
    assert of["lag"][-1] == 2200


def test_the_tables_alarms_are_one_a_measure_wherever_they_end():
    media = Media()
    for event in (told.watched("bn1", "bn2"), told.alarm(10, "bn1")):
        media.take(event)
    assert [row[-1] for row in media.table()[1]] == ["lag", ""]
    media.take(told.alarm(20, "bn2", "cleared"))
    assert [row[-1] for row in media.table()[1]] == ["", ""]


def test_disabled_only_the_record_is_written(tmp_path):
    [logger] = make_loggers(composed("logger.mode=disabled").logger, run_dir.RunFolder(tmp_path), {}, is_first=True)
    logger.log_metrics({"train/loss": 1.0}, step=10)
    logger.take(told.measured(20))
    logger.finalize("success")
    logger.log_metrics({"test/loss": 1.0}, step=30)  # Lightning tests after it has finalized the fit
    assert [row["step"] for row in record.load(tmp_path / "record.jsonl").rows] == [10, 20, 30]
    assert [path.name for path in tmp_path.iterdir()] == ["record.jsonl"]


def offline():
    return composed("logger.mode=offline")


def test_only_the_first_rank_writes(tmp_path):
    run = run_dir.RunFolder(tmp_path)
    for logger in make_loggers(composed("logger.mode=offline").logger, run, {}, is_first=False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lightning.pytorch.utilities.rank_zero_only.rank", 1)
            logger.log_metrics({"loss": 1.0}, step=1)
            logger.take(told.measured(1))
            logger.finalize("success")
    assert list(tmp_path.iterdir()) == []
