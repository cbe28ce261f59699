"""The machine: devices and their mesh, processes, compiled programs, counts of operations and the figures of chips."""
