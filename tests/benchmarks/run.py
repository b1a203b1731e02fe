"""Prints one table: this package against Zoobot 2.9.0, plain `transformers.Trainer` and a bare torch loop.

    python tests/benchmarks/run.py                        # everything; `make bench` does this
    python tests/benchmarks/run.py --rows data unfrozen --encoders convnext_nano --repeats 1
    python tests/benchmarks/run.py --summarize .benchmarks/results-*.jsonl

Every measurement is a process of its own, and ours and its peers take turns. Each result is appended to a JSON-lines
file at once, so that an interrupted benchmark isn't lost: `--results FILE` goes on with one. The rows:

- `frozen`: seconds of the frozen stage, imports not counted, from reading the catalog to the best weights in the model;
  validation after each epoch and checkpoints included. A peer that ran fewer epochs than the row says is extrapolated
  with the median of its steady epochs, and the value is marked with *.
- `accuracy`: accuracy, log loss and ROC AUC of the frozen stage after 20 epochs, each fold the test split once; folds
  that the file has already are not run again.
- `unfrozen`: images per second of training, validation not counted, median of the epochs after the first; ours, like
  the bare loop's, are the best of eager and compiled.
- `prediction`: images per second of a catalog of JPEG files, beyond what a short one takes; ours, like the bare loop's,
  are the best of eager and compiled.
- `unfrozen_float32`: the same with ours in float32, as on a CPU the others are in any case; by default our steps are in
  bfloat16 on a CPU with AMX or AVX512_BF16.
- `unfrozen_bf16` and `prediction_bf16`: the same with all of them in bfloat16, in which on a GPU ours and the bare loop
  compute in any case. Zoobot's prediction fails in it: it hands a bfloat16 tensor to NumPy.
- `embeddings`: images per second of the one pass of the encoder that the frozen stage needs, from JPEG files.
- `reading`: images per second from JPEG files to batches, with no encoder behind: what an encoder can get at most.
- `data`: milliseconds of CPU time for a training image, from the JPEG file to the encoder's input.
- `warm_start`: seconds until the first step of a frozen stage that has been run before.
- `stored_embeddings`: seconds of a frozen stage of 20 epochs over 100,000 galaxies that has been run before.
- `prediction_memory`: peak memory of predicting a short and a long catalog.

Peak memory is that of the process and its workers together, memory that they share counted once (PSS, sampled every few
seconds), or the main process's own highest (RSS, exact) where that is more.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
from table import read_records, summarize
from torch import cuda

SCRIPTS = Path(__file__).parent
# A sample walks through all pages, about 0.1 s for a process with four workers.
SECONDS_BETWEEN_SAMPLES = 5
COMPETITORS = {
    "ours": "ours.py",
    "zoobot": "zoobot_peer.py",
    "trainer": "plain_trainer.py",
    "bare": "bare_loop.py",
}
ROWS = {
    "frozen": ("ours", "zoobot", "trainer"),
    "accuracy": ("ours", "zoobot"),
    "unfrozen": ("ours", "zoobot", "trainer", "bare"),
    "unfrozen_float32": ("ours", "zoobot", "bare"),
    "unfrozen_bf16": ("ours", "zoobot", "bare"),
    "prediction": ("ours", "zoobot", "bare"),
    "prediction_bf16": ("ours", "bare"),
    "embeddings": ("ours",),
    "reading": ("ours",),
    "data": ("ours", "zoobot", "trainer"),
    "warm_start": ("ours",),
    "stored_embeddings": ("ours",),
    "prediction_memory": ("ours",),
}


@dataclass(frozen=True)
class Job:
    """One measurement: who does what, with which encoder."""

    row: str
    task: str
    competitor: str
    encoder: str
    fold: int = 0
    epochs: int = 0
    batch_size: int = 32
    galaxies: int = 0
    bf16: bool | None = None
    is_recorded: bool = True


def main():
    options = parse_options()
    if options.summarize:
        print(summarize(read_records(options.summarize)))
        return
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    prepare(options)
    failures = 0
    for job in plan(options):
        if is_done(job, options.results):
            continue
        record = run(job, options)
        failures += record is None
        if record and job.is_recorded:
            with options.results.open("a") as file:
                file.write(json.dumps(record) + "\n")
    print(summarize(read_records([options.results])))
    print(f"\nall results: {options.results}")
    if failures:
        sys.exit(f"{failures} measurements failed; see {options.work / 'logs'}.")


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--encoders", nargs="+", default=default_encoders(), help="timm names or folders")
    parser.add_argument("--competitors", nargs="+", choices=COMPETITORS, default=list(COMPETITORS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 20, 100], help="of the frozen stage")
    parser.add_argument("--peer_epochs", type=int, default=20, help="a peer runs no more; the rest is extrapolated")
    parser.add_argument("--batch_size", type=int, default=32, help="of the peers' frozen stages, and of predictions")
    parser.add_argument("--unfrozen_batch_size", type=int, default=16, help="of all")
    parser.add_argument("--unfrozen_galaxies", type=int, default=128)
    parser.add_argument("--prediction_galaxies", type=int, default=1410)
    parser.add_argument("--stored_galaxies", type=int, default=100_000)
    parser.add_argument("--memory_galaxies", type=int, nargs="+", default=[1_000, 20_000])
    parser.add_argument("--arguments", default="{}", help="JSON: further arguments of our two stages")
    parser.add_argument("--work", type=Path, default=Path(".benchmarks"))
    parser.add_argument("--results", type=Path, help="a new file in the work folder when absent")
    parser.add_argument("--zoobot_python", default=".venv-zoobot/bin/python")
    parser.add_argument("--untimed", action="store_true", help="the machine is busy: use the scores and not the times")
    parser.add_argument("--summarize", type=Path, nargs="+", metavar="FILE", help="measure nothing, print the table")
    options = parser.parse_args()
    options.results = options.results or options.work / f"results-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    return options


def default_encoders():
    """Zoobot's recommended one, and a MobileNetV2: the trained one where it is."""
    trained = Path("../shared/encoders/mobilenetv2-in1k")
    return ["convnext_nano", str(trained) if trained.is_dir() else "mobilenetv2_100"]


def prepare(options):
    (options.work / "logs").mkdir(parents=True, exist_ok=True)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, SCRIPTS / "prepare.py", "--output", options.work, "--folds", str(options.folds)]
    subprocess.run([*command, "--encoders", *options.encoders], check=True)


def plan(options):
    """The jobs in order; ours and the peers take turns."""
    for encoder in options.encoders:
        for row in options.rows:
            competitors = [name for name in ROWS[row] if name in options.competitors]
            repeats = range(options.folds if row == "accuracy" else options.repeats)
            yield from (
                job
                for repeat in repeats
                for competitor in competitors
                for job in jobs_of_row(row, competitor, encoder, repeat, options)
            )


def jobs_of_row(row, competitor, encoder, repeat, options):
    """What one competitor runs for a row, once."""
    base = {"row": row, "competitor": competitor, "encoder": encoder, "batch_size": options.batch_size}
    for suffix, bf16 in (("_bf16", True), ("_float32", False)):
        if row.endswith(suffix):
            row, base["bf16"] = row.removesuffix(suffix), bf16
    fold = repeat % options.folds
    if row == "frozen":
        most = max(options.epochs) if competitor == "ours" else options.peer_epochs
        chosen = sorted({min(epochs, most) for epochs in options.epochs})
        return [Job(**base, task="frozen", fold=fold, epochs=epochs) for epochs in chosen]
    if row == "accuracy":
        return [Job(**base, task="frozen", fold=fold, epochs=20)]
    if row == "unfrozen":
        base |= {"batch_size": options.unfrozen_batch_size, "galaxies": options.unfrozen_galaxies}
        return [Job(**base, task="unfrozen", fold=fold, epochs=3)]
    if row in ("prediction", "embeddings", "reading"):
        return [Job(**base, task=row, galaxies=options.prediction_galaxies)]
    if row == "data":
        return [Job(**base, task="data", fold=fold)]
    if row == "warm_start":
        return after_a_first_run(Job(**base, task="frozen", epochs=1), repeat)
    if row == "stored_embeddings":
        # It brings its own encoder: once is enough.
        if encoder != options.encoders[0]:
            return []
        base |= {"encoder": "", "galaxies": options.stored_galaxies}
        return after_a_first_run(Job(**base, task="stored_embeddings", epochs=20), repeat)
    # It takes long and comes out the same each time.
    catalogs = [] if repeat else options.memory_galaxies
    return [Job(**base, task="prediction_memory", galaxies=galaxies) for galaxies in catalogs]


def after_a_first_run(job, repeat):
    """The job, before its first repeat once more to fill the cache."""
    return [job] if repeat else [replace(job, is_recorded=False), job]


def is_done(job, results):
    """Whether the scores of a fold are there already: the peers' in any case, ours if nothing has changed since."""
    if job.row != "accuracy" or not results.is_file():
        return False
    names, commit = ("task", "competitor", "encoder", "fold", "epochs"), describe_commit()
    is_unchanged = job.competitor != "ours" or not commit.endswith("-dirty")
    wanted = [asdict(replace(job, encoder=Path(job.encoder).name))[name] for name in names]
    return is_unchanged and any(
        [record["job"][name] for name in names] == wanted
        for record in read_records([results])
        if job.competitor != "ours" or record["commit"] == commit
    )


def run(job, options):
    """The record of one measurement, or None where it failed."""
    if job.row in ("warm_start", "stored_embeddings"):
        return run_process(job, options, options.work / "caches" / f"{job.row}-{Path(job.encoder).name}")
    with tempfile.TemporaryDirectory() as folder:
        return run_process(job, options, Path(folder))


def run_process(job, options, cache):
    name = Path(job.encoder).name
    log_path = options.work / "logs" / f"{job.row}-{job.competitor}-{name}-{job.epochs}-{job.fold}-{job.galaxies}.log"
    loads, started = os.getloadavg(), time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"{started} {job.row}: {job.competitor}, {name}, {describe(job)}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as scratch, log_path.open("w") as log:
        output = Path(scratch) / "result.json"
        process = subprocess.Popen(
            command_of(job, options, scratch=scratch, output=output),
            stdout=log,
            stderr=subprocess.STDOUT,
            # A fresh folder is a machine on which nothing was run before; no row counts the time of compiling.
            env={**os.environ, "HF_HOME": f"{cache}/hf", "XDG_CACHE_HOME": f"{cache}/xdg"}
            | {"TORCHINDUCTOR_CACHE_DIR": str((options.work / "caches" / "inductor").resolve())},
        )
        peak = watch_memory(process)
        if process.wait() != 0:
            print(f"  failed with {process.returncode}; see {log_path}", file=sys.stderr, flush=True)
            return None
        result = json.loads(output.read_text())
    return {
        "time": started,
        "timed": not options.untimed,
        "job": {**asdict(job), "encoder": name},
        "result": result,
        "peak_memory_mib": max(peak, result["peak_rss_mib"]),
        "load_before": loads,
        "machine": describe_machine(),
        "commit": describe_commit(),
    }


def command_of(job, options, *, scratch, output):
    python = options.zoobot_python if job.competitor == "zoobot" else sys.executable
    is_folder = Path(job.encoder).is_dir()
    command = [python, SCRIPTS / COMPETITORS[job.competitor], "--task", job.task, "--output", output]
    command += ["--encoder", job.encoder if is_folder else options.work / "encoders" / job.encoder]
    command += ["--fold", options.work / f"fold-{job.fold}.csv", "--scratch", Path(scratch) / "scratch"]
    command += ["--epochs", job.epochs, "--batch_size", job.batch_size, "--galaxies", job.galaxies]
    if job.bf16 is not None:
        command.append("--bf16" if job.bf16 else "--no-bf16")
    if job.competitor == "ours":
        command += ["--arguments", options.arguments]
    return [str(part) for part in command]


def watch_memory(process):
    """The most memory in MiB that a process and those below it had at once; returns when it ends."""
    peak, ended = 0, threading.Event()

    def sample():
        nonlocal peak
        while not ended.wait(SECONDS_BETWEEN_SAMPLES):
            peak = max(peak, memory_of_tree(process.pid))

    sampler = threading.Thread(target=sample)
    sampler.start()
    process.wait()
    ended.set()
    sampler.join()
    return peak / 2**20


def memory_of_tree(identifier):
    total = 0
    try:
        parent = psutil.Process(identifier)
        for process in [parent, *parent.children(recursive=True)]:
            total += process.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        pass  # it ended meanwhile
    return total


def describe(job):
    facts = {"fold": job.fold, "epochs": job.epochs, "galaxies": job.galaxies}
    return ", ".join(f"{name} {value}" for name, value in facts.items() if value or name == "fold")


def describe_machine():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "gpu": cuda.get_device_name() if cuda.is_available() else "none",
        "python": platform.python_version(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
    }


def describe_commit():
    answer = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=SCRIPTS)
    return answer.stdout.strip()


if __name__ == "__main__":
    main()
