"""Many runs: which, how each is started and judged, and who chooses them."""
