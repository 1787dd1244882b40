"""The Factmesh connector service; see README.md beside this package."""
