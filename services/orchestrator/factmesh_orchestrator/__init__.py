"""The Factmesh orchestrator service; see README.md beside this package."""
