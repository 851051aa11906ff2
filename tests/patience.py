"""How long tests wait for others: machines that run them stall for seconds, and nothing here measures speed.

Only what hangs takes longer. These are ends of waits, never bounds between two behaviours, and all lie below pytest's
own time limit.
"""

PATIENCE_S = 60.0
# What a test holds up until it lets it go; it outlasts every wait.
HELD_S = 4 * PATIENCE_S
# For a process that imports torch to do its work and end.
PROCESS_S = 500.0
