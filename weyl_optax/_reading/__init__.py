"""How the leaves of a tree are read as matrices: a specification, and one from a traced loss."""
