"""The run's report (`write_report`): `series` reduces the metrics, `charts` draws, `page` lays out."""

from recursive_jax.rounds.report.page import write_report

__all__ = ["write_report"]
