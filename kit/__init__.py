"""What stands behind the scripts. Imports go down only: run and sweeps, state, learn, watch, data, base."""
