"""The Factmesh intake service; see README.md beside this package."""
