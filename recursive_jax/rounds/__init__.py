"""Run, manifests, lineage, iterate, report."""
