"""The run's report (`write_report`): `series` reduces the metrics, `charts` draws, `page` lays out what every run has,
and a recipe's `Layout` (`regimes`, `task`) the rest."""

from recursive_jax.rounds.report.page import Layout, View, plain_layout, write_report

__all__ = ["Layout", "View", "plain_layout", "write_report"]
