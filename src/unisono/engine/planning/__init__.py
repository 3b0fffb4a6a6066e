"""Which way a call runs: measured once for each kind of call, remembered, explained."""
