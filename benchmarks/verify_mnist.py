"""All instances of the verification benchmark, decided and compared with QVIP's verdicts.

Behind ``arqsearch bench verify-mnist``. One instance runs in one process on one thread; `workers` instances run side by
side. The CSV grows with every verdict, so that a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import csv
import multiprocessing
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from arqsearch.benchmarks.qnn_benchmark import Instance, images_of, load_benchmark
from arqsearch.benchmarks.results import this_machine
from arqsearch.certify.linf.verdict import Limits, Status, Verdict
from arqsearch.certify.linf.verifier import CompleteVerifier
from arqsearch.errors import ArqError

RECIPE = "verify-mnist"
TITLE = "MNIST, 6-bit MLP 784-64-32 of Henzinger et al. 2021, complete verification"
#: ``--quick`` takes every tenth instance.
QUICK_STRIDE = 10
#: QVIP's word for a status of ours.
NAMES: Mapping[Status, str] = {"robust": "Robust", "non-robust": "Non-robust", "misclassified": "NA"}

#: Told ``(task, done, total, note)``.
OnProgress: TypeAlias = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Outcome:
    """One instance decided, or not.

    :param seconds: wall clock.
    :param cpu_seconds: processor time of its process.
    """

    instance: Instance
    verdict: Verdict
    seconds: float
    cpu_seconds: float


def run(
    seconds: float, workers: int, quick: bool, path: Path | None, progress: OnProgress, folder: str | Path | None = None
) -> list[dict[str, Any]]:
    """Decide the instances that the file does not hold yet.

    :param seconds: limit for one instance.
    :param workers: instances side by side, each on one thread.
    :param path: CSV file that is read, continued and in the end sorted; None keeps nothing.
    :param folder: the benchmark's files; default: below the data root.
    :returns: a row for each instance, by ε and image.
    :raises ArqError: when the file holds another run's rows.
    """
    program, instances = load_benchmark(folder)
    chosen = instances[::QUICK_STRIDE] if quick else instances
    common = _common(program.hash, seconds, workers)
    rows = _kept(path, common) if path is not None else {}
    missing = [instance for instance in chosen if (instance.epsilon, instance.image) not in rows]
    images, labels = images_of(missing)
    file = path.open("a", newline="", encoding="utf-8") if path is not None else None
    try:
        writer: Any = None
        for done, found in enumerate(_decide(missing, images, labels, seconds, workers, folder), start=1):
            row = {**common, **_row(found)}
            rows[found.instance.epsilon, found.instance.image] = row
            if file is not None:
                writer = writer or _writer(file, row)
                writer.writerow(row)
                file.flush()
            progress("instances", done, len(missing), f"ε={found.instance.epsilon} {found.verdict.status}")
    finally:
        if file is not None:
            file.close()
    ordered = [rows[key] for key in sorted(rows)]
    if path is not None and ordered:
        _rewrite(path, ordered)
    return ordered


def summary(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts over all rows; seconds over the instances that are not misclassified, open ones included."""
    listed = list(rows)
    asked = [row for row in listed if row["known"] != "NA"]
    tally = {status: sum(row["verdict"] == status for row in listed) for status in ("robust", "non-robust", "unknown")}
    times = [float(row["seconds"]) for row in asked]
    return {
        "instances": len(listed),
        "decided": sum(row["verdict"] in ("robust", "non-robust") for row in asked),
        "of": len(asked),
        "robust": tally["robust"],
        "non_robust": tally["non-robust"],
        "open": tally["unknown"],
        "misclassified": sum(row["verdict"] == "misclassified" for row in listed),
        "conflicts": sum(conflict(str(row["verdict"]), str(row["known"])) for row in listed),
        "mean_seconds": round(float(np.mean(times)), 3) if times else 0.0,
        "max_seconds": round(max(times, default=0.0), 2),
        "mean_cpu_seconds": round(float(np.mean([float(row["cpu_seconds"]) for row in asked])), 3) if asked else 0.0,
        "max_cpu_seconds": round(max((float(row["cpu_seconds"]) for row in asked), default=0.0), 2),
        "seconds_limit": float(listed[0]["limit_seconds"]) if listed else None,
        "workers": int(listed[0]["workers"]) if listed else None,
        "hardware": this_machine(),
    }


def conflict(status: str, known: str) -> bool:
    """Whether a verdict contradicts QVIP's; an open one does not."""
    return status != "unknown" and NAMES[status] != known  # type: ignore[index]


def csv_path(output: Path, quick: bool) -> Path:
    """A CSV file as given, or one named after benchmark and machine in a folder."""
    if output.suffix == ".csv":
        return output
    return output / f"{RECIPE}-{this_machine()}{'-quick' if quick else ''}.csv"


@cache
def _verifier(seconds: float, folder: str | Path | None) -> CompleteVerifier:
    return CompleteVerifier(load_benchmark(folder)[0], Limits(seconds))


def decide(
    instance: Instance, image: NDArray[np.uint8], label: int, seconds: float, folder: str | Path | None
) -> Outcome:
    """Decide one instance in this process, on one thread."""
    import torch

    torch.set_num_threads(1)
    verifier = _verifier(seconds, folder)
    start, used = time.monotonic(), time.process_time()
    verdict = verifier.verify(image, label, instance.epsilon)
    return Outcome(instance, verdict, time.monotonic() - start, time.process_time() - used)


def _decide(
    instances: list[Instance], images: Any, labels: Any, seconds: float, workers: int, folder: str | Path | None
) -> Iterable[Outcome]:
    """Outcomes as they come; larger ε, which take longer, first."""
    order = sorted(range(len(instances)), key=lambda i: (-instances[i].epsilon, instances[i].image))
    if workers == 1:
        for i in order:
            yield decide(instances[i], images[i], int(labels[i]), seconds, folder)
        return
    # A fresh process for each worker: torch and HiGHS hold threads that a fork would lose.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(decide, instances[i], images[i], int(labels[i]), seconds, folder) for i in order]
        for future in as_completed(waiting):
            yield future.result()


def _common(program: str, seconds: float, workers: int) -> dict[str, Any]:
    from arqsearch import __version__

    return {
        "recipe": RECIPE, "title": TITLE, "hardware": this_machine(), "version": __version__, "program": program,
        "limit_seconds": seconds, "workers": workers,
    }  # fmt: skip


def _row(found: Outcome) -> dict[str, Any]:
    instance, verdict = found.instance, found.verdict
    return {
        "epsilon": instance.epsilon, "image": instance.image, "known": instance.known,
        "known_seconds": "" if instance.known_seconds is None else instance.known_seconds, "verdict": verdict.status,
        "method": verdict.method, "domains": verdict.domains, "seconds": round(found.seconds, 4),
        "cpu_seconds": round(found.cpu_seconds, 4),
    }  # fmt: skip


def _writer(file: Any, row: Mapping[str, Any]) -> Any:
    writer = csv.DictWriter(file, list(row), lineterminator="\n")
    if file.tell() == 0:
        writer.writeheader()
    return writer


def _rewrite(path: Path, rows: list[dict[str, Any]]) -> None:
    """The same rows in order, put in place at once."""
    draft = path.with_name(path.name + ".part")
    with draft.open("w", newline="", encoding="utf-8") as file:
        writer = _writer(file, rows[0])
        writer.writerows(rows)
    draft.replace(path)


def _kept(path: Path, common: Mapping[str, Any]) -> dict[tuple[int, int], dict[str, Any]]:
    """Rows of an earlier start; a last line that was cut off is dropped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if None not in row.values() and row.get("cpu_seconds")]
    for row in rows:
        other = next(
            (key for key in ("program", "limit_seconds", "hardware", "version") if row[key] != str(common[key])), ""
        )
        if other:
            raise ArqError(
                f"{path} holds verdicts with {other} = {row[other]}, this run has {common[other]}; give another "
                "--output, or remove the file."
            )
    if rows:
        _rewrite(path, rows)
    else:
        path.unlink()
    return {(int(row["epsilon"]), int(row["image"])): row for row in rows}
