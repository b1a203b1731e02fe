"""The benchmark's results as one table. Measures nothing."""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

PEERS = ("zoobot", "trainer", "bare")
SCORES = {
    "accuracy": lambda labels, chances: accuracy_score(labels, chances > 0.5),
    "log loss": lambda labels, chances: log_loss(labels, chances, labels=[0, 1]),
    "ROC AUC": roc_auc_score,
}


@dataclass(frozen=True)
class Line:
    """What one line of the table shows: its name, whether more is better, and the value of a record."""

    name: str
    more_is_better: bool
    rows: tuple[str, ...]
    value: Callable
    epochs: int | None = None
    galaxies: int | None = None

    def values(self, records, competitor, encoder):
        """The values of a competitor's records, and whether they are extrapolated."""
        chosen = [
            record
            for record in records
            if record["timed"]
            and record["job"]["row"] in self.rows
            and record["job"]["competitor"] == competitor
            and record["job"]["encoder"] == encoder
            and self.galaxies in (None, record["job"]["galaxies"])
        ]
        if self.epochs is None:
            return [self.value(record) for record in chosen], False
        counts = {record["job"]["epochs"] for record in chosen}
        if self.epochs in counts:
            return [self.value(record) for record in chosen if record["job"]["epochs"] == self.epochs], False
        ran = max((count for count in counts if 1 < count < self.epochs), default=None)
        # Ours is never extrapolated.
        if ran is None or competitor == "ours":
            return [], False
        chosen = [record for record in chosen if record["job"]["epochs"] == ran]
        return [self.value(record) + (self.epochs - ran) * steady_epoch(record) for record in chosen], True


def read_records(paths):
    lines = [line for path in paths for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines if line.strip()]


def summarize(records):
    if not records:
        return "no results."
    return "\n".join([*describe_runs(records), "", *list_comparisons(records), "", *list_scores(records)])


def describe_runs(records):
    """Machines, versions and commits; several of each where the results come from several runs."""
    machines = {json.dumps(record["machine"]) for record in records}
    versions = {}
    for record in records:
        environment = "zoobot" if record["job"]["competitor"] == "zoobot" else "ours"
        versions.setdefault(environment, set()).update(record["result"]["versions"].items())
    busiest = max(record["load_before"][0] for record in records if record["timed"]) if any_timed(records) else None
    return [
        *(f"machine: {', '.join(f'{name} {value}' for name, value in json.loads(text).items())}" for text in machines),
        *(
            f"versions ({environment}): {', '.join(' '.join(pair) for pair in sorted(found))}"
            for environment, found in versions.items()
        ),
        f"commits: {', '.join(sorted({record['commit'] for record in records}))}",
        *([] if busiest is None else [f"load before the timed runs: at most {busiest:.1f}"]),
    ]


def any_timed(records):
    return any(record["timed"] for record in records)


def list_comparisons(records):
    """A line for each row, encoder and peer: medians, and how many times better ours is."""
    header = f"{'row':44}{'encoder':20}{'ours':>10}  {'peer':8}{'value':>10} {'ratio':>8}{'runs':>7}"
    rows = [header, "-" * len(header)]
    for line in find_lines(records):
        for encoder in encoders_of(records):
            ours, _ = line.values(records, "ours", encoder)
            peers = {peer: line.values(records, peer, encoder) for peer in PEERS}
            peers = {peer: found for peer, found in peers.items() if found[0]}
            left = f"{line.name:44}{encoder:20}{format_number(ours):>10}"
            if ours and not peers:
                rows.append(f"{left}{len(ours):>36}")
            for peer, (theirs, is_extrapolated) in peers.items():
                mark = "*" if is_extrapolated else " "
                ratio = format_ratio(ours, theirs, line.more_is_better)
                value, runs = format_number(theirs) + mark, f"{len(ours)}/{len(theirs)}"
                rows.append(f"{left}  {peer:8}{value:>11}{ratio:>8}{runs:>7}")
    return [
        *rows,
        "Medians. Ratio: how many times ours is better. *: extrapolated with the median of the steady epochs.",
    ]


def find_lines(records):
    """The lines that the records can fill."""
    jobs = [record["job"] for record in records if record["timed"]]
    epochs = sorted({job["epochs"] for job in jobs if job["row"] in ("frozen", "accuracy")})
    galaxies = sorted({(job["row"], job["galaxies"]) for job in jobs})
    catalogs = [count for row, count in galaxies if row == "prediction_memory"]
    stored = [count for row, count in galaxies if row == "stored_embeddings"]
    frozen = ("frozen", "accuracy")
    has_gpu = any("peak_gpu_mib" in record["result"] for record in records)
    on_gpu = [("unfrozen stage", "unfrozen"), ("prediction", "prediction")] if has_gpu else []
    return [
        *(Line(f"frozen stage, {n} epochs, s", False, frozen, result("seconds"), epochs=n) for n in epochs),
        Line("frozen stage, peak memory, MiB", False, frozen, peak_memory),
        Line("frozen stage, warm second start, s", False, ("warm_start",), result("first_step_seconds")),
        *(
            Line(f"20 epochs, {n:,} stored embeddings, s", False, ("stored_embeddings",), result("seconds"), galaxies=n)
            for n in stored
        ),
        Line("unfrozen stage, images/s", True, ("unfrozen",), result("images_per_second")),
        Line("unfrozen stage, peak memory, MiB", False, ("unfrozen",), peak_memory),
        Line("unfrozen stage in float32, images/s", True, ("unfrozen_float32",), result("images_per_second")),
        Line("unfrozen stage in bfloat16, images/s", True, ("unfrozen_bf16",), result("images_per_second")),
        Line("prediction, images/s", True, ("prediction",), result("images_per_second")),
        Line("prediction, peak memory, MiB", False, ("prediction",), peak_memory),
        Line("prediction in bfloat16, images/s", True, ("prediction_bf16",), result("images_per_second")),
        *(
            Line(f"prediction of {n:,}, peak memory, MiB", False, ("prediction_memory",), peak_memory, galaxies=n)
            for n in catalogs
        ),
        Line("embeddings of the default views, images/s", True, ("embeddings",), result("images_per_second")),
        Line("reading alone, images/s", True, ("reading",), result("images_per_second")),
        *(Line(f"{name}, GPU memory, MiB", False, (row,), gpu_memory) for name, row in on_gpu),
        Line("data path alone, ms a galaxy a core", False, ("data",), result("milliseconds")),
    ]


def result(name):
    return lambda record: record["result"][name]


gpu_memory = result("peak_gpu_mib")


def peak_memory(record):
    return record["peak_memory_mib"]


def steady_epoch(record):
    """Seconds of an epoch, the first not counted."""
    return statistics.median(record["result"]["epoch_seconds"][1:])


def encoders_of(records):
    return list(dict.fromkeys(record["job"]["encoder"] for record in records))


def format_number(values):
    if not values:
        return "-"
    median = statistics.median(values)
    return f"{median:.0f}" if median >= 100 else f"{median:.3g}"


def format_ratio(ours, theirs, more_is_better):
    if not ours or not theirs:
        return "-"
    ratio = statistics.median(ours) / statistics.median(theirs)
    return f"{ratio if more_is_better else 1 / ratio:.2f}"


def list_scores(records):
    """Held-out scores of the frozen stage: mean and standard error over the folds, and ours minus the peer's."""
    found = {}
    for record in records:
        job = record["job"]
        if "test" in record["result"] and job["row"] in ("frozen", "accuracy"):
            folds = found.setdefault((job["encoder"], job["epochs"]), {}).setdefault(job["competitor"], {})
            folds[job["fold"]] = score(record["result"]["test"])
    lines = [f"{'held-out, frozen stage':44}{'folds':>6}" + "".join(f"{name:>20}" for name in SCORES)]
    for (encoder, epochs), competitors in sorted(found.items()):
        for competitor, folds in competitors.items():
            name = f"{encoder}, {epochs} epochs, {competitor}"
            lines.append(f"{name:44}{len(folds):>6}{format_scores(list(folds.values()))}")
        lines += list_differences(competitors)
    return [*lines, "Mean and standard error over the folds."]


def list_differences(competitors):
    """Ours minus each peer's, on the folds that both have."""
    lines = []
    for peer in PEERS:
        both = sorted(competitors.get("ours", {}).keys() & competitors.get(peer, {}).keys())
        if both:
            differences = [competitors["ours"][fold] - competitors[peer][fold] for fold in both]
            lines.append(f"{f'    ours minus {peer}':44}{len(both):>6}{format_scores(differences, sign='+')}")
    return lines


def score(test):
    labels, chances = np.asarray(test["label"]), np.asarray(test["probability"])
    return np.array([measure(labels, chances) for measure in SCORES.values()])


def format_scores(folds, sign=""):
    means = np.mean(folds, axis=0)
    if len(folds) == 1:
        return "".join(f"{mean:>{sign}20.3f}" for mean in means)
    errors = np.std(folds, axis=0, ddof=1) / np.sqrt(len(folds))
    return "".join(f"{f'{mean:{sign}.3f} +- {error:.3f}':>20}" for mean, error in zip(means, errors, strict=True))
