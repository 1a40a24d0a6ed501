"""What a run says while it works: one line for each committed result, with the time that is left."""

from __future__ import annotations

from recursive_jax.generate.reading import failed
from recursive_jax.train.log import console
from recursive_jax.waiting import AFTER, Wait

LONG = 20.0  # seconds between lines of a log


class RunProgress:
    """`total` results are expected (0: unknown). Lines go to stderr; on a terminal the work in hand shows below
    them."""

    def __init__(self, quiet: bool):
        self.quiet, self.total, self.done = quiet, 0, 0
        self._seconds: list[float] = []  # of results made in rounds; the teacher's would mislead

    def waiting(self, label: str) -> Wait:
        """While a result is made: on a terminal what is going on; in a log a line where it takes long."""
        return Wait(f"  {label}", self.quiet, AFTER if console.is_terminal else LONG, LONG)

    def finished(self, label: str, manifest: dict, stored: bool = False) -> None:
        self.done += 1
        if not stored and manifest["round"] > 0:
            self._seconds.append(manifest["seconds"])
        if self.quiet:
            return
        counter = f"[{self.done}/{self.total}]" if self.total else f"[{self.done}]"
        seconds = "stored" if stored else f"{manifest['seconds']:.1f} s"
        console.print(f"{counter:>9}  {label:<34} {summary(manifest):<44} {seconds:>8}{self._left()}", soft_wrap=True)

    def _left(self) -> str:
        if not self.total or len(self._seconds) < 5 or self.done >= self.total:
            return ""
        seconds = sum(self._seconds) / len(self._seconds) * (self.total - self.done)
        return f"   {seconds / 60:.0f} min left" if seconds >= 90 else f"   {seconds:.0f} s left"


def summary(manifest: dict) -> str:
    """The counts of one result in a few words."""
    c, verb = manifest["counts"], manifest["verb"]
    if verb == "train":
        return f"{c['steps']:,} steps, loss {c['loss']:.4f}"
    if verb == "evaluate":
        return f"{c['metrics']} metrics"
    words = [f"{c['rows']:,} rows", f"{c['tokens']:,} tokens"]
    if c.get("real_rows") and c.get("synthetic_rows"):
        of = "tokens" if c["tokens"] else "rows"  # rows that are not tokenized yet have none
        words.append(f"{c[f'real_{of}'] / c[of]:.0%} real")
    if verb == "select":
        words.append(f"{c['proposed'] - c['rows']:,} dropped")
    words += [f"{n:,} {reason}" for reason, n in list(failures(c).items())[:3]]
    return ", ".join(words)


def failures(counts: dict) -> dict[str, int]:
    """reason -> rows that failed for it, the most frequent first."""
    found = {status: n for status, n in counts.get("status", {}).items() if failed(status)}
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))
