"""Factmesh: the platform library that every service and tool is built from.

Pure modules decide, gateways (one a vendor) touch the world, the runtime loops join them; nothing here names a
business process. Importing the package itself must stay free of side effects.
"""

__version__ = "0.1.0"
