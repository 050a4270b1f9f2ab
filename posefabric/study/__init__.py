"""Studies: many configurations built, run and compared."""
