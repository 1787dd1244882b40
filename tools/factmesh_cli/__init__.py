"""The command `factmesh`; every sub-command is a module of its own, loaded when it is called."""
