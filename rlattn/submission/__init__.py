"""Sending a run to a Ray cluster: what is shipped with it, and the commands around jobs."""
