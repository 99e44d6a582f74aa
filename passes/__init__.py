"""Graph passes: retrace, channels, regions, observe, choose, fold, lower, verify."""
