"""Records of runs, the ledger of claims, and figures: reads records, imports no network."""
