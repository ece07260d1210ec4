"""Which layout a run should have on given GPUs: memory, time, and a search over layouts. Pure: nothing is started."""
