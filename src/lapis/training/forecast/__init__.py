"""The settings of a run in, what it will cost out: measured on its first steps here, or on paper for other machines."""
