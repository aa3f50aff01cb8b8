"""A/B experiments on mixes: who gets which arm, what came of it, and what may be concluded."""
