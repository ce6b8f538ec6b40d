"""Settings and their overrides, devices, processes, signals: what everything else stands on."""
