"""How the norms of these matrices are found, on any mesh."""
