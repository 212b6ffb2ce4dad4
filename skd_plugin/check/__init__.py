"""`skd check`: what can go wrong in a run, found before the run."""
