"""A recipe of experts and models of one shape in, a mixture of experts out: their MLPs side by side, and gates."""
