"""What README.md and docs/ say of measurements, and the pictures of growth, from the results files.

python benchmarks/tables.py
"""

import os
from collections.abc import Callable
from pathlib import Path

import growth_figures
import measuring
import scaling
import sentences

from llm_finetuning import plotting

BEGIN, END = "<!-- {}: begin -->", "<!-- {}: end -->"
"""What a block begins and ends with that is written here."""
SHOWN_VERSIONS = ("python", "torch", "transformers", "peft", "trl", "bitsandbytes")

HEADLINES = (
    "data preparation: flattening 84,000 messages, time, the original's loop over ours",
    "packing: 7,000 tokens of the sample, tokens per second, packed over one row per step",
    "merge: time, PEFT's merge_and_unload over ours, into the original base",
    "inference at Phi-2's true size: tokens per second, reading the prompt included, chat.py, llama.cpp over the"
    " original's pipeline in fp32",
    "inference at Phi-2's true size: peak memory, the original's pipeline in fp32 over chat.py, llama.cpp",
)
"""The ratios that the README shows, by their names in a results file."""
BEFORE = ("the original's loop", "PEFT's merge_and_unload", "the original's pipeline in fp32", "one row per step")
"""What a name of the side ends with that something of ours took the place of."""
QUANTITIES = (
    *("tokens per second", "planned tokens per second", "rows per second", "peak memory", "planned memory"),
    *("MFU", "MFU over the data sheet"),
)
"""What is measured of every variant of the training."""


def main() -> None:
    write(measuring.ROOT, measuring.read())


def write(root: Path, reports: list[dict]) -> None:
    """Brings README.md, the pages of docs/ and the pictures in `root` up to date."""
    for name, blocks in BLOCKS.items():
        page = root / name
        replace(page, with_blocks(page.read_text(encoding="utf-8"), blocks, reports))
    replace(root / "docs" / "benchmarks.md", document(reports))
    replace(root / "docs" / "scaling.md", scaling.document(reports))
    for name, picture in growth_figures.pictures(reports).items():
        plotting.save(picture, root / "docs" / name)
    print("written: README.md, and in docs/ running.md, benchmarks.md, scaling.md and the pictures of growth")


def replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def with_blocks(page: str, blocks: dict[str, Callable[[list[dict]], str]], reports: list[dict]) -> str:
    """The page with what was measured between its markers. Raises ValueError unless it has a pair of each."""
    for name, text in blocks.items():
        begin, end = BEGIN.format(name), END.format(name)
        if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
            raise ValueError(f"the page needs {begin} and, below it, {end}, each once: put them where that belongs")
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n{text(reports)}{end}{rest.partition(end)[2]}"
    return page


def compared(reports: list[dict]) -> str:
    """The README's table of what was compared, machine by machine."""
    return "\n".join(f"{head(report)}\n{rows}" for report in reports if (rows := headlines(report)))


BLOCKS = {
    "README.md": {"make run": sentences.make_run, "benchmarks": compared},
    "docs/running.md": {"make rehearse": sentences.make_rehearse},
}
"""Page → name of a block between markers → what is written there."""


def document(reports: list[dict]) -> str:
    """docs/benchmarks.md: everything that was measured, machine by machine, and how it grows."""
    pictures = [embedded(name) for name in growth_figures.pictures(reports)]
    title = "# Measured by `make bench`\n\nWritten by `make tables` from `benchmarks/results/`.\n"
    return "\n".join([title, *[of_machine(report) for report in reports], *pictures]) + "\n"


def embedded(name: str) -> str:
    part = next(part for part, file in growth_figures.FILES.items() if file == name)
    return f'<img src="{name}" width="640" alt="How {part} grows, log axes">'


def of_machine(report: dict) -> str:
    """What was measured on one machine: sides in turn, growth, and what stands alone."""
    parts = [head(report), in_turn(report), growing(report), variants(report), alone(report)]
    return "\n".join(filter(None, parts))


def head(report: dict) -> str:
    machine, versions = report["machine"], report["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in SHOWN_VERSIONS)
    days = sorted(set(report.get("measured", {}).values()))
    measured = f" Measured {' to '.join(dict.fromkeys((days[0], days[-1])))}." if days else ""
    of = f"**{machine['name']}**, {machine['memory_gib']:g} GiB; {named}."
    return f"{of}{measured} Medians, in brackets the whole range.\n"


def headlines(report: dict) -> str:
    """A row for each of HEADLINES: the side that was slower or larger before, the other after, and the factor."""
    by_name = {entry["name"]: entry for entry in report["figures"]}
    ratios = [by_name[name] for name in HEADLINES if name in by_name]
    turned = [ratio["of"] if ratio["of"][0].endswith(BEFORE) else ratio["of"][::-1] for ratio in ratios]
    rows = [row(ratio, sides, by_name) for ratio, sides in zip(ratios, turned, strict=True)]
    return scaling.table(["what", "before", "after", "factor"], rows) if rows else ""


def in_turn(report: dict) -> str:
    """A row for each ratio: both sides, and how many times one is the other."""
    by_name = {entry["name"]: entry for entry in report["figures"]}
    ratios = [ratio for ratio in report["figures"] if "of" in ratio]
    rows = [[*row(ratio, ratio["of"], by_name), str(len(ratio["values"]))] for ratio in ratios]
    heads = ["in turn", "this", "over that", "how many times", "repetitions"]
    return scaling.table(heads, rows) if rows else ""


def row(ratio: dict, names: list[str], by_name: dict[str, dict]) -> list[str]:
    """What was measured, each side with its value, and how many times one is the other."""
    what = os.path.commonprefix(names).rpartition(", ")[0]
    sides = [f"{name[len(what) + 2 :]}: {value(by_name[name])}" for name in names]
    return [what, *sides, f"**{value(ratio)}** {around(ratio)}".strip()]


def growing(report: dict) -> str:
    """A row for each family of points, with the exponent through them."""
    rows = []
    for family in growth_figures.families_of(report):
        points = " · ".join(
            f"{size:,}: {value({'median': median, 'unit': family['unit']})}" for size, median in family["points"]
        )
        rows.append([f"{family['part']}: {family['what']}", family["axis"], points, f"{family['exponent']:.2f}"])
    return scaling.table(["growth", "by", "measured", "exponent"], rows) if rows else ""


def variants(report: dict) -> str:
    """A row for each variant of the training, a column for each quantity."""
    found: dict[str, dict[str, str]] = {}
    for entry in report["figures"]:
        if is_variant(entry):
            part, _, rest = entry["name"].partition(": ")
            quantity, _, name = rest.partition(", ")
            found.setdefault(f"{part}: {name}", {})[quantity] = value(entry)
    rows = [[name, *(cells.get(quantity, "") for quantity in QUANTITIES)] for name, cells in found.items()]
    return scaling.table(["variant", *QUANTITIES], rows) if rows else ""


def is_variant(entry: dict) -> bool:
    part, _, rest = entry["name"].partition(": ")
    return part.startswith("training variants") and rest.partition(", ")[0] in QUANTITIES and "of" not in entry


def alone(report: dict) -> str:
    """A row for each figure that is in none of the other tables."""
    paired = {name for entry in report["figures"] for name in entry.get("of", ())}
    rows = [
        [entry["name"], f"{value(entry)} {around(entry)}".strip(), str(len(entry["values"]))]
        for entry in report["figures"]
        if not (entry["name"] in paired or "of" in entry or "growth" in entry or is_variant(entry))
    ]
    return scaling.table(["and", "measured", "repetitions"], rows) if rows else ""


def value(entry: dict) -> str:
    """The median with its unit, to three digits."""
    return shown(entry["median"], entry["unit"])


def around(entry: dict) -> str:
    """The smallest and the largest repetition; "" where there is one."""
    low, high = min(entry["values"]), max(entry["values"])
    return f"({shown(low, entry['unit'])} to {shown(high, entry['unit'])})" if len(entry["values"]) > 1 else ""


def shown(number: float, unit: str) -> str:
    if unit == "s":
        return seconds(number)
    digits = f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
    return {"x": f"{digits}×", "1": digits}.get(unit, f"{digits} {unit}")


def seconds(number: float) -> str:
    if number >= 120:
        return scaling.planning.readable_seconds(number)
    return f"{number:.3g} s" if number >= 1 else f"{1000 * number:.3g} ms"


if __name__ == "__main__":
    main()
