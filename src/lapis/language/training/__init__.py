"""A plan and a machine in, the settings of both trainings and the texts that they read out."""
