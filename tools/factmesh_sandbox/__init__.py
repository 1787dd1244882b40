"""The sandbox of external systems with switchable faults and its own log of what was really done.
It knows nothing of the mesh and of any business process: the systems come from a sandbox file.
"""
