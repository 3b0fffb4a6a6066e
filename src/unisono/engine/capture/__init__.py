"""One call of an ensemble, recorded as a flat list of tensor ops and replayed.

Read `trace.py` (what is recorded), `recording.py` (how), `simplify.py` (what is left out),
`text.py` (the program as Python), `record.py` (all of that for one strategy), `choice.py` (which
strategy), `guards.py` (when a program holds), `replay.py` (`Capture`, which the user calls).
"""

from unisono.engine.capture.replay import Capture as Capture
