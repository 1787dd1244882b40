"""The Factmesh quarantine service; see README.md beside this package."""
