"""The harness around the library: methods, loop, checkpoints, reports."""
