import pytest
from benchmarks.table import list_comparisons, list_scores

MACHINE = {"machine": {}, "commit": "a", "load_before": [0.0], "timed": True, "peak_memory_mib": 100}


def record(row, competitor, *, epochs=0, fold=0, **result):
    job = {"row": row, "task": row, "competitor": competitor, "encoder": "e", "fold": fold, "epochs": epochs}
    return {**MACHINE, "job": {**job, "galaxies": 0}, "result": {**result, "versions": {}}}


def frozen(competitor, epochs, seconds, epoch_seconds):
    return record("frozen", competitor, epochs=epochs, seconds=seconds, epoch_seconds=epoch_seconds)


def line(records, start):
    return next(line.split() for line in list_comparisons(records) if line.startswith(start))


@pytest.mark.parametrize(
    ("row", "value", "start"),
    [("unfrozen", "images_per_second", "unfrozen stage, images"), ("data", "milliseconds", "data")],
)
def test_ratio_is_how_many_times_ours_is_better(row, value, start):
    ours, theirs = (20, 8) if row == "unfrozen" else (8, 20)
    records = [record(row, "ours", **{value: n}) for n in (ours, 1000, ours)]
    records.append(record(row, "zoobot", **{value: theirs}))
    assert line(records, start)[-6:] == ["e", str(ours), "zoobot", str(theirs), "2.50", "3/1"]


def test_peers_epochs_are_extrapolated_with_the_steady_ones_and_marked():
    records = [frozen("ours", 100, 20.0, [1.0]), frozen("zoobot", 3, 50.0, [30.0, 8.0, 12.0])]
    assert line(records, "frozen stage, 100")[-5:] == ["20", "zoobot", "1020*", "51.00", "1/1"]
    # Three epochs were run: nothing is marked, and ours, which ran 100, has no value there.
    assert line(records, "frozen stage, 3 ")[-5:] == ["-", "zoobot", "50", "-", "0/1"]


def test_results_from_a_busy_machine_have_scores_and_no_times():
    test = {"label": [0, 1], "probability": [0.2, 0.7]}
    busy = {**record("accuracy", "zoobot", epochs=20, seconds=1.0, test=test), "timed": False}
    assert not any("zoobot" in text for text in list_comparisons([busy]))
    assert "1.000" in next(text for text in list_scores([busy]) if "zoobot" in text)


def test_scores_are_compared_fold_by_fold():
    def scored(competitor, fold, probability):
        test = {"label": [0, 1], "probability": probability}
        return record("accuracy", competitor, epochs=20, fold=fold, seconds=1.0, test=test, epoch_seconds=[1.0])

    records = [scored("ours", fold, [0.1, 0.9]) for fold in (0, 1)]
    records += [scored("zoobot", 0, [0.1, 0.9]), scored("zoobot", 1, [0.9, 0.1])]
    difference = next(text.split() for text in list_scores(records) if "ours minus zoobot" in text)
    assert difference[3:7] == ["2", "+0.500", "+-", "0.500"]
