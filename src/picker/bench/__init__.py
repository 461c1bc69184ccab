"""The performance figures of this machine, each measured beside its baseline in the same run."""
