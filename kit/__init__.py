"""The rooms behind the scripts. Each can be read alone; none of them knows a script's settings or the model's insides."""
