"""Results of a study: comparisons, claims, tables and documents."""
