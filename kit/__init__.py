"""The rooms behind the scripts. Each can be read alone; none knows a script's settings or the model's insides."""
