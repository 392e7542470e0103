"""What README.md and docs/running.md say of `make run`, `make rehearse` and the installation, from a results file."""

import scaling

MEASURES = {
    "loss": "loss on responses, nats per token",
    "stop_rate": "answers that end by themselves",
    "exact_match": "answers equal to the reference",
    "rank_agreement": "ranked replies in which the one that people preferred is the more probable one",
}
COLUMNS = {"before": "4-bit base, before", "after": "with the adapter, after", "merged": "merged, read back"}
LONG_STAGES = ("training", "merge and verification", "publishing")
SMALLEST = 0.03
"""Stages with a smaller share of the run are not named."""
UNNAMED = "the rest"

readable = scaling.planning.readable_seconds


def values(report: dict, title: str) -> dict[str, dict]:
    """{name: figure} of a part, without its title."""
    start = f"{title}: "
    return {e["name"].removeprefix(start): e for e in report["figures"] if e["name"].startswith(start)}


def make_run(reports: list[dict]) -> str:
    """README.md's block on `make run`: time and stages, the scoreboard, preference tuning."""
    return "".join(_make_run(report) for report in reports if values(report, "make run"))


def _make_run(report: dict) -> str:
    found = {name: entry["median"] for name, entry in values(report, "make run").items()}
    parts = [_time(report, found), _scoreboard(found), _preferences(values(report, "make run"))]
    return "".join(f"{part.rstrip()}\n\n" for part in parts if part)


def _time(report: dict, found: dict[str, float]) -> str:
    """Time, memory and stages of the run, and the installation before it."""
    if "the whole run" not in found:
        return ""
    installed = {name: entry["median"] for name, entry in values(report, "installation").items()}
    before = (
        f" (the installation before it: {readable(installed['time'])}, {installed['disk']:.1f} GB)" if installed else ""
    )
    return (
        f"`make run` on {report['machine']['name']}, without a GPU: {readable(found['the whole run'])}{before}, at most"
        f" {found['peak memory of its largest process']:.1f} GB of memory. It goes to {_stages(found)}."
    )


def _stages(found: dict[str, float]) -> str:
    """The stages of a run by their shares, the largest first."""
    whole = found["the whole run"]
    shares = {name.partition(", ")[2]: s / whole for name, s in found.items() if name.startswith("stage, ")}
    named = {name: share for name, share in shares.items() if share >= SMALLEST and name != UNNAMED}
    ordered = sorted(named, key=named.get, reverse=True)
    return ", ".join(f"{name} ({named[name]:.0%})" for name in ordered)


def _scoreboard(found: dict[str, float]) -> str:
    rows = [
        [title, *(_score(name, found[f"scoreboard, {name}, {column}"]) for column in COLUMNS)]
        for name, title in MEASURES.items()
        if f"scoreboard, {name}, before" in found
    ]
    return scaling.table(["on validation trees that training never saw", *COLUMNS.values()], rows) if rows else ""


def _score(name: str, value: float) -> str:
    return f"{value:.3f}" if name == "loss" else f"{value:.0%}"


def _preferences(entries: dict[str, dict]) -> str:
    """What preference tuning changed of the finetuned model."""
    start = "preference scoreboard, "
    found = {n.removeprefix(start): e["median"] for n, e in entries.items() if n.startswith(start)}
    if not found:
        return ""
    change = entries[f"{start}change of accuracy, after"]
    return (
        "Preference tuning on top of it (`--notebooks preference`): the reply that people preferred is the more"
        f" probable one in {found['accuracy, after']:.0%} of the held-out pairs instead of"
        f" {found['accuracy, before']:.0%} ({100 * change['median']:+.0f} points, 95% interval"
        f" {100 * change['low']:.0f} to {100 * change['high']:.0f}, n = {change['n']}), and in"
        f" {found['accuracy, merged']:.0%} with the merged model; the loss goes from {found['loss, before']:.3f} to"
        f" {found['loss, after']:.3f}, and {found['stop_rate, after']:.0%} of the answers end by themselves."
    )


def make_rehearse(reports: list[dict]) -> str:
    """docs/running.md's block on `make rehearse`: time, stages and memory."""
    title = "make rehearse at Phi-2's true size"
    return "".join(_make_rehearse(report, found) for report in reports if (found := values(report, title)))


def _make_rehearse(report: dict, entries: dict[str, dict]) -> str:
    found = {name: entry["median"] for name, entry in entries.items()}
    times = [
        f"{name} {readable(found[f'stage, {name}'])}" for name in ("training", "merge and verification", "publishing")
    ]
    return (
        f"On {report['machine']['name']} the four notebooks took {readable(found['the whole run'])}:"
        f" {', '.join(times)}. Training held at most {found['peak memory of the training']:.1f} GB, the largest process"
        f" {found['peak memory of its largest process']:.1f} GB.\n"
    )
