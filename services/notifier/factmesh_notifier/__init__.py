"""The Factmesh notifier service; see README.md beside this package."""
