"""What a person sees: the journal and its sinks, run logs, diagnosis, pictures, evaluation."""
