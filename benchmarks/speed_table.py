"""The tables of docs/benchmarks.md, from the CSV files of ``arqsearch bench integer-speed``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

#: A row of a CSV file; absent cells are left out.
Row = dict[str, str]

DASH = "–"
_LABELS = {
    "torch_eager": "PyTorch fp32, as published code runs it", "torch_best": "PyTorch fp32, at its best",
    "onnxruntime_fp32": "onnxruntime fp32", "onnxruntime_int8": "onnxruntime int8",
    "openvino_fp32": "OpenVINO fp32", "openvino_int8": "OpenVINO int8",
    "arqsearch_w8a8": "**arqsearch W8A8**", "arqsearch_w4a4": "**arqsearch W4A4**",
    "arqsearch_w2a4": "**arqsearch W2A4**", "arqsearch_mixed": "**arqsearch mixed**",
}  # fmt: skip


def rates_table(rows: Sequence[Row]) -> str:
    """Images per second of each contender and network, with the times of PyTorch at its best, and how each ran."""

    def cell(row: Row) -> str:
        ratio = f" ({float(row['ratio_to_torch_best']):.2f}×)" if "ratio_to_torch_best" in row else ""
        return f"{_rate(row['images_per_second'])}{ratio}"

    first = rows[0]
    limit = "the best that the processor has" if first["limit"] == "auto" else f"{first['limit']} at most"
    wrong = sum(int(row.get("mismatches", 0)) for row in rows)
    caption = (
        "Images per second on one thread; in brackets, how many times as fast as PyTorch at its best (median of paired "
        f"ratios, {_rounds(rows)} rounds). "
        f"Measured on `{first['hardware']}` ({first['cpu']}), instruction set: {limit}. "
        f"{_versions(first)}. Logits of ours that differ from the reference: {wrong}."
    )
    return f"{caption}\n\n{_grid(rows, cell)}\n\n{_how(rows)}"


def milliseconds_table(rows: Sequence[Row]) -> str:
    """Milliseconds for one image, and billions of multiply-accumulates for each second, by contender and network."""

    def cell(row: Row) -> str:
        rate = float(row["images_per_second"])
        return f"{_three(1000 / rate)} ms, {rate * float(row['mmacs']) / 1000:.0f} GMAC/s"

    first = rows[0]
    caption = f"Time for one image and arithmetic rate, one thread, on `{first['hardware']}`."
    return f"{caption}\n\n{_grid(rows, cell)}"


def _grid(rows: Sequence[Row], cell: Callable[[Row], str]) -> str:
    """Contenders down, networks across."""
    from arqsearch.report.tables import Cell, Table

    found = {(row["contender"], _network(row)): row for row in rows}
    networks = {_network(row): row for row in rows}
    header = [Cell("")]
    for name, row in networks.items():
        header.append(Cell(f"{name}, batch {row['batch']}, {float(row['mmacs']):,.0f} M MACs"))
    lines = []
    for contender in dict.fromkeys(row["contender"] for row in rows):
        cells = [cell(found[contender, name]) if (contender, name) in found else DASH for name in networks]
        lines.append([Cell(_LABELS.get(contender, contender)), *map(Cell, cells)])
    return Table(header, lines).markdown()


def _how(rows: Sequence[Row]) -> str:
    """One line for each contender: precision, instruction set, and how it ran where that differs by network."""
    lines = []
    for contender in dict.fromkeys(row["contender"] for row in rows):
        own = [row for row in rows if row["contender"] == contender]
        notes: dict[str, list[str]] = {}
        for row in own:
            notes.setdefault(row.get("note", ""), []).append(_network(row))
        told = next(iter(notes)) if len(notes) == 1 else "; ".join(f"{', '.join(n)}: {t}" for t, n in notes.items())
        isas = ", ".join(dict.fromkeys(row["isa"] for row in own))
        lines.append(f"- `{contender}`: {own[0]['bits']}; instruction set {isas}; {told}.")
    return "\n".join(lines)


def _network(row: Row) -> str:
    return f"{row['network']} {row['resolution']}×{row['resolution']}"


def _rounds(rows: Sequence[Row]) -> str:
    """Fewest and most rounds of a network."""
    counts = sorted({int(row["rounds"]) for row in rows})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"


def _versions(row: Row) -> str:
    return ", ".join(part.replace("=", " ") for part in row["versions"].split())


def _rate(value: str) -> str:
    return f"{float(value):,.0f}" if float(value) >= 100 else f"{float(value):.1f}"


def _three(value: float) -> str:
    """Three significant digits without an exponent."""
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"
