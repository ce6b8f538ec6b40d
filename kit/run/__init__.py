"""What train.py alone needs: where a run starts, what is due at a step, looks and replays, its end."""
